"""A tensor that does not verify is named with the bytes that differ, to the piece: the seed is asked for its pieces."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import torch
from attrs import evolve
from lying_seeds import Liar, kind_of
from seed_leases import SECONDS, connected, model, soon, take, until
from whole_forks import to_meta

import tensorfork
from tensorfork.digest.definition import PIECE, root
from tensorfork.fork import verification, wrong_pieces
from tensorfork.seed.digests import DigestCache
from tensorfork.wire import messages, tables
from tensorfork.wire.conversation import Conversation
from tensorfork.wire.messages import MAX_PIECES_OF

Model = dict[str, torch.Tensor]
LONG = 2 * PIECE + 1000
"""Bytes of a tensor of three pieces."""


def several() -> Model:
    return {
        "long": torch.arange(LONG, dtype=torch.uint8),
        "short": torch.arange(100.0),
        "nothing": torch.zeros(0),
    }


def strided() -> Model:
    return several() | {
        "transposed": torch.zeros(2048, 2048, dtype=torch.float32).t(),
        "expanded": torch.ones(2 * PIECE // 8 + 1, 1, dtype=torch.float64).expand(-1, 3),
    }


def blank(model: Model) -> Model:
    """The same layout, over other memory."""
    return {name: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype) for name, one in model.items()}


@pytest.fixture
def tensors() -> Model:
    return several()


@pytest.fixture
def seed(tensors: Model) -> Iterator[tensorfork.Seed]:
    """A seed that has computed its digests."""
    with tensorfork.publish(tensors) as seed:
        seed.digests()
        yield seed


def failure(seed: tensorfork.Seed | str, ours: Model | None = None, **options: Any) -> tensorfork.VerificationFailed:
    ours = blank(several()) if ours is None else ours
    address = seed if isinstance(seed, str) else seed.address
    with pytest.raises(tensorfork.VerificationFailed) as raised:
        tensorfork.fork_into(ours, address, timeout=SECONDS, **options)
    return raised.value


# Which bytes differ.


@pytest.mark.parametrize("where", ["in place", "meta"])
@pytest.mark.parametrize("transport", ["zeromq", "gloo"])
def test_a_changed_byte_is_named_by_its_piece(
    seed: tensorfork.Seed, tensors: Model, transport: str, where: str
) -> None:
    for begin, end in ((0, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, LONG)):
        for at in (begin, end - 1):
            tensors["long"][at] ^= 1  # outside of updating(): its digests are those of before
            ours = to_meta(several()) if where == "meta" else None
            error = failure(seed, ours, transport=transport, device="cpu")
            assert error.tensors == ("long",)
            assert error.ranges == {"long": ((begin, end),)}
            assert f"long (bytes {begin:,} to {end:,})" in str(error)
            tensors["long"][at] ^= 1


def test_bytes_are_counted_as_they_lie_and_neighbours_make_one_range() -> None:
    tensors = strided()
    with tensorfork.publish(tensors) as seed:
        seed.digests()
        for at in (PIECE, LONG - 1):
            tensors["long"][at] ^= 1
        tensors["short"][7] += 1
        tensors["transposed"].t().view(-1)[PIECE // 4] += 1
        tensors["expanded"][0, 0] += 1
        tensors["expanded"][-1, 0] += 1
        error = failure(seed, blank(strided()))
    assert error.ranges == {
        "long": ((PIECE, LONG),),
        "short": ((0, 400),),
        "transposed": ((PIECE, 2 * PIECE),),
        "expanded": ((0, PIECE), (2 * PIECE, 2 * PIECE + 8)),
    }
    assert set(error.tensors) == set(error.ranges)
    assert ": long (bytes 8,388,608 to 16,778,216), short, transposed (bytes" in str(error)
    assert "expanded (bytes 0 to 8,388,608, 16,777,216 to 16,777,224)" in str(error)


def test_a_tensor_that_is_called_otherwise_here_is_named_as_here(seed: tensorfork.Seed, tensors: Model) -> None:
    tensors["long"][PIECE] ^= 1
    ours = {f"x.{name}": tensor for name, tensor in blank(several()).items()}
    assert failure(seed, ours, rename={"x.": ""}).ranges == {"x.long": ((PIECE, 2 * PIECE),)}


def test_many_ranges_are_counted_in_words() -> None:
    wrong = wrong_pieces.Wrong("w", (1, 2), 3)
    ranges = {"w": tuple((i * PIECE, i * PIECE + 1) for i in range(5))}
    assert wrong_pieces.in_words("w", wrong, ranges).endswith("16,777,217 and 2 more ranges)")
    assert wrong_pieces.in_words("w", wrong, {}) == "w"


def test_of_very_many_tensors_the_first_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_PIECES_OF", 1)
    tensors = strided()
    with tensorfork.publish(tensors) as seed:
        seed.digests()
        tensors["long"][0] ^= 1
        tensors["transposed"][0, 0] += 1
        error = failure(seed, blank(strided()))
    assert error.tensors == ("long", "transposed")
    assert error.ranges == {"long": ((0, PIECE),)}


# A seed that does not say, or lies.


def lied_to(seed: tensorfork.Seed, lie: Callable[[list[bytes]], list[bytes] | None], expected: type[Exception]) -> Any:
    def lies(frames: list[bytes]) -> list[bytes] | None:
        return lie(frames) if kind_of(frames) == "Pieces" else frames

    ours = blank(several())
    with Liar(seed.address, lies) as address, pytest.raises(expected) as raised:
        tensorfork.fork_into(ours, address, timeout=SECONDS)
    return raised.value


def refusing(code: str) -> Callable[[list[bytes]], list[bytes]]:
    def lie(frames: list[bytes]) -> list[bytes]:
        number = msgpack.unpackb(frames[0])[2]
        return [messages.encode(messages.Refused(code, "no"), number)]

    return lie


def later(frames: list[bytes]) -> list[bytes]:
    return [messages.encode(messages.Pieces(2), msgpack.unpackb(frames[0])[2]), *frames[1:]]


SILENT: dict[str, Callable[[list[bytes]], list[bytes] | None]] = {
    "says nothing": lambda frames: None,
    "has changed": refusing(messages.CHANGED),
    "has moved": refusing(messages.MOVED),
    "is asleep": refusing(messages.ASLEEP),
    "has ended the lease": refusing(messages.UNKNOWN),
    "knows no such request": refusing(messages.MALFORMED),
    "is at another generation": later,
}


@pytest.mark.parametrize("how", SILENT)
def test_a_seed_that_does_not_say_changes_nothing_about_the_failure(
    seed: tensorfork.Seed, tensors: Model, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "EXPLAIN_TIMEOUT", 0.2)
    tensors["long"][0] ^= 1
    tensors["short"][0] += 1
    error = lied_to(seed, SILENT[how], tensorfork.VerificationFailed)
    assert error.tensors == ("long", "short")
    assert error.ranges == {"short": ((0, 400),)}


LIES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a piece": lambda frames: [frames[0], bytes(8) + frames[1][8:]],
    "their order": lambda frames: [frames[0], frames[1][8:] + frames[1][:8]],
    "one too few": lambda frames: [frames[0], frames[1][:-8]],
    "one too many": lambda frames: [frames[0], frames[1] + bytes(8)],
    "a part of one": lambda frames: [frames[0], frames[1][:-1]],
    "none": lambda frames: frames[:1],
    "those of another tensor too": lambda frames: [*frames, frames[1]],
}


@pytest.mark.parametrize("lie", LIES)
def test_pieces_that_do_not_make_the_seed_s_digest_break_the_protocol(
    seed: tensorfork.Seed, tensors: Model, lie: str
) -> None:
    tensors["long"][0] ^= 1
    lied_to(seed, LIES[lie], tensorfork.ProtocolError)


def test_a_seed_whose_digest_was_the_lie_is_found_out_by_its_pieces(seed: tensorfork.Seed) -> None:
    def lie(frames: list[bytes]) -> list[bytes]:
        return [frames[0], bytes(8) + frames[1][8:]] if kind_of(frames) == "Digests" else frames

    with Liar(seed.address, lie) as address, pytest.raises(tensorfork.ProtocolError, match="pieces of long are not"):
        tensorfork.fork(address, timeout=SECONDS)


def test_a_fork_that_is_cancelled_while_it_asks_is_cancelled(seed: tensorfork.Seed, tensors: Model) -> None:
    tensors["long"][0] ^= 1
    cancel = threading.Event()

    def lie(frames: list[bytes]) -> list[bytes] | None:
        if kind_of(frames) == "Pieces":
            cancel.set()
            return None
        return frames

    with Liar(seed.address, lie) as address, pytest.raises(tensorfork.ForkCancelled):
        tensorfork.fork(address, timeout=SECONDS, cancel=cancel)


def test_pieces_are_not_asked_for_where_all_is_well_or_every_tensor_has_one(
    seed: tensorfork.Seed, tensors: Model
) -> None:
    came: list[str] = []

    def watch(frames: list[bytes]) -> list[bytes]:
        came.append(kind_of(frames))
        return frames

    with Liar(seed.address, watch) as address:
        tensorfork.fork(address, timeout=SECONDS)
        tensors["short"][0] += 1
        assert failure(address).ranges == {"short": ((0, 400),)}
        assert "Pieces" not in came
        tensors["long"][0] ^= 1
        failure(address)
        assert "Pieces" in came


# At the seed.


def ask(conversation: Conversation, lease: messages.Leased, *which: int) -> tuple[int, list[bytes]]:
    request = messages.GetPieces(lease.lease, list(which))
    reply, frames = conversation.request(request, messages.Pieces, soon(), "pieces")
    return reply.generation, frames


def test_the_pieces_of_the_tensors_asked_for_hash_to_their_digests(seed: tensorfork.Seed) -> None:
    counts = dict(zip(several(), (3, 1, 0), strict=True))
    digests = seed.digests()
    names = [tensor.name for tensor in seed.layout.tensors]
    with connected(seed.address) as conversation:
        lease = take(conversation)
        for which in ((0, 1, 2), (0, 2), (1,), ()):
            generation, frames = ask(conversation, lease, *which)
            assert (generation, len(frames)) == (0, len(which))
            for i, frame in zip(which, frames, strict=True):
                found = tables.unpack_digests([frame], counts[names[i]])
                assert f"{root(found):016x}" == digests[names[i]]
    assert seed.stats().digested == 1


def test_who_asks_before_they_are_computed_waits_for_them() -> None:
    with tensorfork.publish(several()) as seed, connected(seed.address) as conversation:
        assert len(ask(conversation, take(conversation), 0)[1][0]) == 3 * 8
        assert seed.stats().digested == 1


@pytest.mark.parametrize("which", [(3,), (0, 3), (messages.MAX_TENSORS + 7,), ((1 << 64) - 1,)])
def test_a_tensor_that_is_not_there_is_refused(seed: tensorfork.Seed, which: tuple[int, ...]) -> None:
    with connected(seed.address) as conversation:
        with pytest.raises(tensorfork.PeerRefused, match="the seed has 3 tensors"):
            ask(conversation, take(conversation), *which)
        tensorfork.fork(seed.address, timeout=SECONDS)


@pytest.mark.parametrize(
    "which", [[1, 0], [3, 3], [-1], ["long"], [True], [0.0], [None], list(range(MAX_PIECES_OF + 1))]
)
def test_what_is_no_rising_list_of_a_hundred_is_refused(which: list[Any]) -> None:
    with pytest.raises(ValueError, match="must be at most 100 natural numbers, each above the last one"):
        messages.GetPieces(b"lease", which)


def test_pieces_are_those_of_the_lease_s_generation(seed: tensorfork.Seed, tensors: Model) -> None:
    with connected(seed.address) as conversation:
        stale = take(conversation)
        before = ask(conversation, stale, 0)[1]
        with seed.updating():
            tensors["long"][PIECE] ^= 1
        generation, after = ask(conversation, take(conversation), 0)
        with pytest.raises(tensorfork.SeedChanged):
            ask(conversation, stale, 0)
    assert generation == 2
    assert [before[0][i : i + 8] == after[0][i : i + 8] for i in range(0, 24, 8)] == [True, False, True]


def test_pieces_without_a_lease_are_refused(seed: tensorfork.Seed) -> None:
    with connected(seed.address) as conversation, pytest.raises(tensorfork.PeerRefused, match="the lease has ended"):
        ask(conversation, evolve(take(conversation), lease=b"another"), 0)


def test_a_request_for_pieces_keeps_the_digests_from_being_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[bool] = []
    request = DigestCache.request

    def seen(cache: DigestCache, *args: Any) -> None:
        wanted.append(cache._wanted())
        request(cache, *args)

    monkeypatch.setattr(DigestCache, "request", seen)
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        ask(conversation, take(conversation), 0)
        until(lambda: wanted == [True], "the lease wants digests")
