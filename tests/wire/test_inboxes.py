"""What a seed says of leases unasked is kept until it is read, and no more than so much of it."""

from collections.abc import Callable
from typing import Any

import pytest

from tensorfork import ProtocolError
from tensorfork.wire import messages
from tensorfork.wire.inboxes import MAX_SHARES, MAX_UNREAD, Inboxes

ENDED = messages.Ended(b"one", messages.Refused("changed", "other tensors"))


def test_messages_come_out_as_they_went_in_for_each_lease() -> None:
    inboxes = Inboxes()
    for lease, said in ((b"one", b"a"), (b"two", b"b"), (b"one", b"c")):
        assert inboxes.put(messages.Say(lease), [b"", said])
    assert [inboxes.get(b"one"), inboxes.get(b"one"), inboxes.get(b"one")] == [b"a", b"c", None]
    assert not inboxes.is_empty(b"two")
    assert inboxes.get(b"two") == b"b"
    assert inboxes.is_empty(b"two")
    assert inboxes.is_empty(b"three")


def test_the_end_of_a_lease_stays() -> None:
    inboxes = Inboxes()
    inboxes.put(ENDED, [b""])
    assert [inboxes.get(b"one"), inboxes.get(b"one")] == [ENDED, ENDED]


def test_a_share_is_known_once_it_was_changed_and_of_a_few_leases() -> None:
    inboxes = Inboxes()
    assert inboxes.share(b"0", 5.0) == 5.0
    for i in range(100):
        inboxes.put(messages.ChangeShare(str(i).encode(), 1.0), [b""])
    assert inboxes.share(b"99", None) == 1.0
    assert inboxes.share(b"0", None) is None
    assert len(inboxes._shares) <= MAX_SHARES


def test_what_is_no_such_message_is_not_kept() -> None:
    assert not Inboxes().put(messages.Checked(1), [b""])


def flood(message: Callable[[int], Any], frames: list[bytes]) -> None:
    inboxes = Inboxes()
    for i in range(MAX_UNREAD):
        inboxes.put(message(i), frames)


@pytest.mark.parametrize("said", [b"", bytes(1 << 20)], ids=["empty", "long"])
@pytest.mark.parametrize("leases", [1, 1000])
def test_more_than_may_wait_is_an_error(said: bytes, leases: int) -> None:
    with pytest.raises(ProtocolError, match="bytes came that nobody had asked for"):
        flood(lambda i: messages.Say(str(i % leases).encode()), [b"", said])


def test_ends_of_leases_that_nobody_has_are_bounded_too() -> None:
    with pytest.raises(ProtocolError):
        flood(lambda i: messages.Ended(str(i).encode(), ENDED.why), [bytes(60_000)])


def test_what_was_read_waits_no_more() -> None:
    inboxes = Inboxes()
    for _ in range(100):
        inboxes.put(messages.Say(b"one"), [b"", bytes(1 << 20)])
        assert inboxes.get(b"one") == bytes(1 << 20)
