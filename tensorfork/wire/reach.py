"""Reaching a seed: its name's addresses are tried side by side, and the one that answers a hello is the one."""

import time
from threading import Event

import zmq

from tensorfork.errors import ForkCancelled, PeerUnreachable, ProtocolError, TensorForkError
from tensorfork.interpreter.limits import require_descriptors
from tensorfork.sockets.address import Address, resolve
from tensorfork.sockets.race import SILENCE, AllFailed, TCPAttempt, race
from tensorfork.version import __version__
from tensorfork.wire import messages
from tensorfork.wire.conversation import ADVICE, Conversation

HELLO_TIMEOUT = 10.0
"""Seconds for looking up a name; and, of a peer that has taken the connection and shaken hands, for its answer. The
handshake is libzmq's, so that a seed whose interpreter is busy has made it, and a process that is stopped has not."""

WAIT_ADVICE = "If the seed may still be starting, say with wait= for how long to try."


class _Greeting:
    """An attempt to get a welcome from one address; a `tensorfork.sockets.race.Attempt`.

    First a TCP connection, which tells why there is none; then ZeroMQ's handshake, then the hello.
    """

    def __init__(self, peer: Address, address: Address, deadline: float, cancel: Event, stall: float) -> None:
        self._peer, self._end, self._cancel, self._stall = peer, deadline, cancel, stall
        self._tcp: TCPAttempt | None = TCPAttempt(address, deadline)
        self._conversation: Conversation | None = None
        self._sent = False
        self.deadline = self._tcp.deadline

    def register(self, poller: zmq.Poller) -> None:
        """See `Attempt`."""
        if self._tcp is not None:
            self._tcp.register(poller)
        elif self._conversation is not None:
            self._conversation.register(poller, to_send=not self._sent)

    def advance(self) -> tuple[Conversation, messages.Welcome] | None:
        """See `Attempt`."""
        if self._tcp is not None:
            address = self._tcp.advance()
            if address is None:
                return None
            self._tcp = None
            self._conversation = Conversation(self._peer, address, self._cancel, self._stall)
            self.deadline = min(self._end, time.monotonic() + SILENCE)
        conversation = self._conversation
        assert conversation is not None
        if not self._sent and conversation.try_send_hello(messages.Hello(__version__)):
            self._sent, self.deadline = True, min(self._end, time.monotonic() + HELLO_TIMEOUT)
        if self._sent and (welcome := conversation.try_recv_welcome()) is not None:
            return conversation, welcome
        if time.monotonic() >= self.deadline:
            raise PeerUnreachable(conversation.why_silent())
        return None

    def close(self) -> None:
        """See `Attempt`."""
        if self._tcp is not None:
            self._tcp.close()
        if self._conversation is not None:
            self._conversation.close()


def look_up(peer: Address, deadline: float, cancel: Event) -> list[Address]:
    """All addresses of the seed's name. Raises `PeerUnreachable`, `ForkCancelled` and `ResourceExhausted`."""
    require_descriptors()  # without any, looking up a name says that there is no such host
    soon = min(deadline, time.monotonic() + HELLO_TIMEOUT)
    return list(resolve(peer, soon, lambda: _check(peer, cancel, "resolve")))


def greet(
    peer: Address, addresses: list[Address], deadline: float, cancel: Event, stall: float
) -> tuple[Conversation, messages.Welcome]:
    """The conversation with the first of the addresses that answers a hello, and its welcome. `stall` is the
    conversation's.

    A closed port costs no time, a silent host `SILENCE` seconds, a peer that only shakes hands `HELLO_TIMEOUT`.

    Raises:
        PeerUnreachable: nobody answers, at any of them; what each says is named.
        ProtocolError: what answers is no seed of our version, at each of them.
        ForkCancelled: `cancel` is set.
    """

    def begin(address: Address) -> _Greeting:
        return _Greeting(peer, address, deadline, cancel, stall)

    try:
        return race(addresses, begin, lambda: _check(peer, cancel, "hello"))
    except AllFailed as failed:
        raise _error(peer, failed) from failed


def hello_again(peer: Address, at: Address, deadline: float, cancel: Event) -> messages.Welcome:
    """The welcome of whoever answers on another connection to the same address, and one only: what spreads connections
    in turn would show the same seed again to every other one. Raises as `greet` does.
    """
    conversation = Conversation(peer, at, cancel)
    try:
        return conversation.request(messages.Hello(__version__), messages.Welcome, deadline, "hello")[0]
    finally:
        conversation.close()


def _check(peer: Address, cancel: Event, step: str) -> None:
    if cancel.is_set():
        raise ForkCancelled(f"{peer}: the fork was cancelled (at step {step})")


def _error(peer: Address, failed: AllFailed) -> TensorForkError:
    errors = list(failed.failures.values())
    others = [error for error in errors if not isinstance(error, PeerUnreachable)]
    if len(errors) == 1 and others:
        return others[0]
    texts = {address: str(error).removeprefix(f"{peer}: ") for address, error in failed.failures.items()}
    if len(errors) == 1:
        return PeerUnreachable(f"{peer}: {next(iter(texts.values()))} (at step hello). {ADVICE} {WAIT_ADVICE}")
    each = "; ".join(f"{address.host}: {text}" for address, text in texts.items())
    kind = ProtocolError if len(others) == len(errors) else PeerUnreachable
    return kind(f"{peer}: none of its {len(errors)} addresses answers (at step hello): {each}. {ADVICE} {WAIT_ADVICE}")
