"""Peers that send a message of endless parts: they are cut off, cost the seed little memory, and forks are served."""

import pytest
from flood import all_ended, floods
from hostile import MORE, MUCH, SECONDS, Seed, answers, dealer, frame

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
