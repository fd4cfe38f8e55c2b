import contextlib
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import Child

import tensorfork
from tensorfork import errors
from tensorfork.testing import TransportSuite

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/index.md", "docs/quickstart.md", "docs/errors.md", "docs/transports.md"]


def blocks(page: str) -> list[str]:
    """The Python of a page; what is fenced as `py` is not meant to be run."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(page: str, source: str, names: dict[str, Any]) -> None:
    exec(compile(source, page, "exec"), names)


def example() -> ModuleType:
    """The transport that docs/transports.md shows."""
    module = ModuleType("peek")
    (source,) = [block for block in blocks("docs/transports.md") if "class Peek(" in block]
    run("docs/transports.md", source, vars(module))
    return module


Peek = example().Peek


class TestTheExampleIsATransport(TransportSuite):
    ways = ("within one process",)
    one_sided = True

    def make(self) -> tensorfork.Transport:
        return Peek()


def serve(pipe: Any) -> None:
    with tensorfork.publish({"w": torch.arange(1_000_000)}, transports=[Peek()]) as seed:
        pipe.send(seed.address)
        pipe.recv()


def test_the_example_transport_forks_from_another_process() -> None:
    with Child(serve) as child:
        model = {"w": torch.empty(1_000_000, dtype=torch.int64)}
        report = tensorfork.fork_into(model, child.recv(), transport=Peek())
        child.send("done")
    assert report.transport == "peek"
    assert report.verified
    assert torch.equal(model["w"], torch.arange(1_000_000))


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(page):
            run(page, block, names)
    assert blocks(page)
    for name in ("seed", "everywhere"):
        if name in names:
            names[name].close()


def test_the_readme_s_example_is_one_block_and_prints_where_the_seed_is_and_what_the_fork_did() -> None:
    (block,) = blocks("README.md")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run("README.md", block, {})
    address, report = said.getvalue().splitlines()
    assert re.fullmatch(r"published at tcp://127\.0\.0\.1:\d+", address)
    assert report.startswith("forked 3 tensors (46.67 MB) from tcp://127.0.0.1:")


def test_the_reference_has_every_public_name_once() -> None:
    text = (ROOT / "docs/reference.md").read_text()
    shown = re.findall(r"^::: tensorfork\.(\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(set(tensorfork.__all__) - {"__version__"})


def test_the_table_of_errors_has_every_error_once() -> None:
    text = (ROOT / "docs/errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TensorForkError) and value is not errors.TensorForkError
    }
    assert sorted(rows) == sorted(kinds)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_files_that_a_page_links_to_exist(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_the_makefile_has_every_command_that_the_pages_name() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, "CONTRIBUTING.md"]:
        named = set(re.findall(r"(?:^|`)make (\w+)", (ROOT / page).read_text(), re.MULTILINE))
        assert named <= targets, page
