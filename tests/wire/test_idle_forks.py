"""Forks that do nothing or go away: the seed serves the next one."""

import resource
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import psutil
import pytest
import torch
from hostile import GREETING, MUCH, READY, SECONDS, Seed, frame, hung_up, model, raw, send, zmtp
from processes import Child, serve
from seed_leases import connection_to

import tensorfork
from tensorfork.wire import messages
from tensorfork.wire.conversation import Conversation

pytestmark = pytest.mark.slow


def test_peers_that_connect_and_send_nothing_hold_up_nobody(seed: Seed) -> None:
    idle = [socket.create_connection(seed.at, timeout=SECONDS) for _ in range(200)]
    try:
        seed.serves()
    finally:
        for connection in idle:
            connection.close()


def test_a_peer_that_sends_nothing_is_disconnected(seed: Seed) -> None:
    with raw(seed) as connection:
        assert hung_up(connection)


def large_model() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.zeros(1) for i in range(5000)}


def test_a_peer_that_asks_and_never_reads_costs_little() -> None:
    with Child(serve, large_model) as child:
        seed = Seed(child)
        tensorfork.fork(seed.address, timeout=SECONDS)
        before = seed.memory()
        with zmtp(seed) as connection:
            connection.settimeout(1.0)
            send(connection, frame(messages.encode(messages.GetLayout(), 1)) * 5000)
            assert len(tensorfork.fork(seed.address, timeout=SECONDS)) == 5000
            assert seed.memory() - before < MUCH


@pytest.mark.parametrize("greeting", [b"", GREETING + READY], ids=["silent", "after ZeroMQ's handshake"])
def test_more_idle_connections_than_descriptors_leave_the_seed_quiet_and_forks_get_in(greeting: bytes) -> None:
    """Where no descriptor was left, libzmq tried again and again to accept those who waited: a core was busy."""
    limit, idle = 256, []
    with Child(serve, model, {resource.RLIMIT_NOFILE: limit}) as child, ExitStack() as stack:
        seed = Seed(child)
        process = psutil.Process(child.pid)
        holder = connection_to(seed.address)
        stack.callback(holder.close)
        lease = lease_of(holder, time.monotonic() + SECONDS)
        for _ in range(345):
            idle.append(stack.enter_context(socket.create_connection(seed.at, timeout=SECONDS)))
            send(idle[-1], greeting)
        seed.serves()
        while process.num_fds() > limit - 60:  # nobody connects any more; those that were ended are closed
            time.sleep(0.01)
        before = process.cpu_times()
        time.sleep(1.0)
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.2
        seed.serves()
        check = messages.CheckLease(lease, False)
        holder.request(check, messages.Checked, time.monotonic() + SECONDS, "check")  # it was there before them all


def lease_of(conversation: Conversation, deadline: float) -> bytes:
    request = messages.TakeLease("zeromq", {}, SECONDS, True)
    return conversation.request(request, messages.Leased, deadline, "lease")[0].lease


def until_welcome(conversation: Conversation, deadline: float) -> None:
    conversation.request(messages.Hello("test"), messages.Welcome, deadline, "hello")


def until_layout(conversation: Conversation, deadline: float) -> None:
    until_welcome(conversation, deadline)
    conversation.request(messages.GetLayout(), messages.Pages, deadline, "layout")


def until_lease(conversation: Conversation, deadline: float) -> None:
    lease_of(conversation, deadline)


def until_message_sent(conversation: Conversation, deadline: float) -> None:
    conversation.send(lease_of(conversation, deadline), b"something", deadline)


def until_digests(conversation: Conversation, deadline: float) -> None:
    conversation.request(messages.GetDigests(lease_of(conversation, deadline)), messages.Digests, deadline, "digests")


def until_checked(conversation: Conversation, deadline: float) -> None:
    lease = lease_of(conversation, deadline)
    conversation.request(messages.CheckLease(lease, False), messages.Checked, deadline, "check")


def until_released(conversation: Conversation, deadline: float) -> None:
    lease = lease_of(conversation, deadline)
    conversation.request(messages.CheckLease(lease, True), messages.Checked, deadline, "release")


def in_the_middle_of_an_answer(conversation: Conversation, deadline: float) -> None:
    until_welcome(conversation, deadline)
    for _ in range(50):
        conversation._send_frames([messages.encode(messages.GetLayout(), 1)], deadline, "layout")


@pytest.mark.parametrize(
    "step",
    [
        until_welcome,
        until_layout,
        until_lease,
        until_message_sent,
        until_digests,
        until_checked,
        until_released,
        in_the_middle_of_an_answer,
    ],
    ids=lambda step: step.__name__,
)
def test_a_fork_may_go_away_at_any_step(seed: Seed, step: Callable[[Conversation, float], None]) -> None:
    deadline = time.monotonic() + SECONDS
    for _ in range(3):
        conversation = connection_to(seed.address)
        try:
            step(conversation, deadline)
        finally:
            conversation.close()


def test_a_fork_that_sends_more_messages_than_are_read_loses_its_lease_and_nothing_else(seed: Seed) -> None:
    deadline = time.monotonic() + SECONDS
    conversation = connection_to(seed.address)
    try:
        lease = lease_of(conversation, deadline)
        for _ in range(200):
            conversation.send(lease, b"x" * 1000, deadline)
        with pytest.raises(tensorfork.PeerRefused, match="the lease has ended"):
            conversation.request(messages.CheckLease(lease, False), messages.Checked, deadline, "check")
    finally:
        conversation.close()
