"""Make of digest.cu what GPUs take: ``python -m tensorfork.kernels.build``, with ``nvidia-cuda-nvrtc-cu12==12.9.86``.

Machine code for the GPUs of today, and PTX for all others from Volta on; so whoever uses this library needs no
compiler, and compiles nothing. A test sees that all of it was made of the source beside it.
"""

import ctypes
import hashlib
import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

CAPABILITIES = (75, 80, 90, 100, 120)
"""Machine code is for one of these, and for later ones of the same ten."""
OLDEST = 70
"""What the PTX is for."""
PTX_VERSION = "7.0"
"""What drivers from CUDA 11.0 on take; the compiler writes its own, and nothing that needs it."""


def stamp(source: str) -> str:
    """The first line of the PTX: by it one sees which source it was made of."""
    return f"// of digest.cu, sha256 {hashlib.sha256(source.encode()).hexdigest()}\n"


def build(source: str, architecture: str, kind: str, nvrtc: ctypes.CDLL) -> bytes:
    """Compile. `kind` is PTX or CUBIN. Raises `RuntimeError` with the compiler's log."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"digest.cu", 0, None, None)
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
    failed = nvrtc.nvrtcCompileProgram(program, 2, options)
    wanted = "ProgramLog" if failed else kind
    getattr(nvrtc, f"nvrtcGet{wanted}Size")(program, ctypes.byref(size))
    made = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{wanted}")(program, made)
    if failed:
        raise RuntimeError(made.value.decode())
    return made.raw


def main() -> None:
    """Read digest.cu, write the rest beside it."""
    folder = Path(str(files("tensorfork.digest.kernels")))
    source = (folder / "digest.cu").read_text()
    package = find_spec("nvidia.cuda_nvrtc")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("pip install nvidia-cuda-nvrtc-cu12==12.9.86")
    nvrtc = ctypes.CDLL(str(Path(package.submodule_search_locations[0]) / "lib/libnvrtc.so.12"))
    ptx = build(source, f"compute_{OLDEST}", "PTX", nvrtc).rstrip(b"\0").decode()
    ptx = re.sub(r"^\.version .*$", f".version {PTX_VERSION}", ptx, flags=re.MULTILINE)
    (folder / "digest.ptx").write_text(stamp(source) + ptx)
    for capability in CAPABILITIES:
        made = build(source, f"sm_{capability}", "CUBIN", nvrtc)
        (folder / f"digest.sm_{capability}.cubin").write_bytes(made)


if __name__ == "__main__":
    main()
