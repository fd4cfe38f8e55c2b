"""What a seed and a fork of this version say is kept as bytes, and understood by those of now; so is a future's.

The files in ``frozen/`` are recorded by ``python tests/support/frozen.py``. Once a release has gone out with this
version of the protocol, they must stay as they are: a test that fails then shows that a fleet cannot be upgraded
process by process, and that there must be another version (docs/decisions.md, "Additions to the wire").
"""

import frozen
import msgpack
import pytest
import torch
from frozen import Said

from tensorfork.wire import messages

WHEN = ["", "-of-the-future"]


@pytest.mark.parametrize("when", WHEN, ids=["now", "future"])
def test_a_fork_of_now_reads_the_answers_that_were_kept(when: str) -> None:
    with frozen.played_seed(frozen.read(f"fork{when}")) as address:
        model, report = frozen.fork(address)
    expected = frozen.Model()
    for name, tensor in model.state_dict().items():
        if name != "cache":
            assert torch.equal(tensor, expected.state_dict()[name]), name
    assert model.tied is model.weight
    assert model.weight.stride() == expected.weight.stride()
    assert report.verified
    assert report.left_out_by_seed == ("cache",)
    assert report.values is not None
    assert not report.values.different
    assert report.version is not None
    assert (report.version.label, report.version.counter) == ("step-1", 0)


@pytest.mark.parametrize("when", WHEN, ids=["now", "future"])
def test_a_fork_of_now_reads_pieces_and_refusals_that_were_kept(when: str) -> None:
    with frozen.played_seed(frozen.read(f"ask{when}")) as address:
        pieces, errors = frozen.ask(address)
    assert [len(one) for one in pieces] == [8]
    assert ["the lease has ended" in error for error in errors] == [True, True]


@pytest.mark.parametrize("when", WHEN, ids=["now", "future"])
@pytest.mark.parametrize("name", frozen.CONVERSATIONS)
def test_a_seed_of_now_answers_the_requests_that_were_kept(name: str, when: str) -> None:
    said = frozen.read(f"{name}{when}")
    then = [one for one in said if not one.by_fork]
    with frozen.publish() as seed:
        now = frozen.play_fork(said, seed.address)
        assert seed.stats().granted == 1
    assert [one.kind for one in now] == [one.kind for one in then]
    for one, other in zip(now, then, strict=True):
        assert body(other).keys() - frozen.FUTURE.keys() <= body(one).keys()
        assert columns(other) == [
            {name: column for name, column in page.items() if name in before}
            for page, before in zip(columns(one), columns(other), strict=True)
        ]
        if one.kind in ("Digests", "Pieces"):
            assert one.frames[1:] == other.frames[1:]


def test_every_kind_of_message_is_kept_and_the_future_has_something_in_each() -> None:
    kept = [one for name in frozen.CONVERSATIONS for one in frozen.read(name)]
    of_one_sided_transports = {"ChangeShare"}
    kinds = {kind.__name__ for kind in (*messages.REQUESTS, *messages.REPLIES)}
    assert {one.kind for one in kept} == kinds - of_one_sided_transports
    for name in frozen.CONVERSATIONS:
        assert all(frozen.FUTURE.keys() <= body(one).keys() for one in frozen.read(f"{name}-of-the-future"))


def columns(said: Said) -> list[dict[str, object]]:
    """The columns that were known, of each of its tables. Hashes of values differ from seed to seed."""
    tables = [msgpack.unpackb(page) for page in frozen.tables_of(said)]
    return [{name: page[name] for name in page.keys() - frozen.FUTURE.keys() - {"value"}} for page in tables]


def body(said: Said) -> dict[str, object]:
    found: dict[str, object] = msgpack.unpackb(said.frames[0])[4]
    return found
