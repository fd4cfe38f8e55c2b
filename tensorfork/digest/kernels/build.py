"""Compile digest.cu: ``python -m tensorfork.digest.kernels.build``, with ``nvidia-cuda-nvrtc-cu12==12.9.86``.

Writes machine code for today's GPUs, and PTX for all others from Volta on; so users of the library need no compiler.
A test checks that the PTX was compiled from the source beside it.
"""

import ctypes
import hashlib
import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

CAPABILITIES = (75, 80, 90, 100, 120)
"""Compute capabilities that machine code is compiled for. It also runs on later ones of the same major number."""
OLDEST = 70
"""The compute capability that the PTX is compiled for."""
PTX_VERSION = "7.0"
"""Accepted by drivers from CUDA 11.0 on. The compiler writes a later one, but uses nothing that needs it."""


def stamp(source: str) -> str:
    """The first line of the PTX, which tells the source it was compiled from."""
    return f"// of digest.cu, sha256 {hashlib.sha256(source.encode()).hexdigest()}\n"


def build(source: str, architecture: str, kind: str, nvrtc: ctypes.CDLL) -> bytes:
    """Compile to `kind`, PTX or CUBIN. Raises `RuntimeError` with the compiler's log."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"digest.cu", 0, None, None)
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
    failed = nvrtc.nvrtcCompileProgram(program, 2, options)
    output = "ProgramLog" if failed else kind
    getattr(nvrtc, f"nvrtcGet{output}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{output}")(program, text)
    if failed:
        raise RuntimeError(text.value.decode())
    return text.raw


def main() -> None:
    """Read digest.cu, and write what it compiles to beside it."""
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
        cubin = build(source, f"sm_{capability}", "CUBIN", nvrtc)
        (folder / f"digest.sm_{capability}.cubin").write_bytes(cubin)


if __name__ == "__main__":
    main()
