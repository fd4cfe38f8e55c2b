"""Peers that send a message of endless parts: they are cut off, cost the seed little memory, and forks are served."""

import pytest
from flood import NOTHING, PART, all_ended, flooding_seed, floods
from hostile import MORE, MUCH, SECONDS, Seed, answers, dealer, frame
from processes import Child
from seed_leases import connection_to, soon, until

import tensorfork
from tensorfork.wire import messages

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("count", [1, 8])
def test_messages_of_endless_parts_end_their_connections(seed: Seed, count: int) -> None:
    before = seed.memory()
    with floods(seed.at, count) as peers:
        assert all_ended(peers, SECONDS)
        seed.serves()
    assert seed.memory() - before < MUCH


def test_a_flood_of_parts_of_the_greatest_size_is_cut_off_too(seed: Seed) -> None:
    before = seed.memory()
    with floods(seed.at, 4, part=frame(bytes(messages.MAX_MESSAGE), MORE)) as peers:
        assert all_ended(peers, SECONDS)
        seed.serves()
    assert seed.memory() - before < MUCH


def test_an_honest_connection_may_send_as_much_as_it_likes(seed: Seed) -> None:
    """In whole messages: 40 MB of them, ten times what may be unfinished."""
    request = messages.encode(messages.Say(b"no such lease"), 1)
    with dealer(seed) as made:
        for _ in range(20):
            for _ in range(10):
                made.send_multipart([request, bytes(200_000)])
            answers(made)
    seed.serves()


@pytest.mark.parametrize("count", [1, 8])
def test_parts_of_no_bytes_are_cut_off_long_before_others(seed: Seed, count: int) -> None:
    with floods(seed.at, count, part=NOTHING) as peers:
        assert all_ended(peers, SECONDS)
        seed.serves()


@pytest.mark.parametrize("part", [NOTHING, PART], ids=["parts of no bytes", "parts of 255"])
def test_a_seed_that_answers_with_endless_parts_is_cut_off(part: bytes) -> None:
    with Child(flooding_seed, part) as child:
        conversation = connection_to(child.recv())
        try:
            with pytest.raises(tensorfork.PeerUnreachable, match="a message without an end"):
                conversation.request(messages.Hello("test"), messages.Welcome, soon(), "hello")
            assert conversation._guard.ended == 1
        finally:
            conversation.close()


def test_a_seed_that_sends_endless_parts_while_nothing_is_asked_is_cut_off_too() -> None:
    with Child(flooding_seed, NOTHING) as child:
        conversation = connection_to(child.recv())
        try:
            with conversation.watched("transfer"):
                conversation._send_frames([messages.encode(messages.Hello("test"), 1)], soon(), "hello")
                until(lambda: bool(conversation._guard.ended), "it is cut off")
        finally:
            conversation.close()
