"""Connecting to several addresses side by side: the first that answers is taken ("happy eyeballs", RFC 8305)."""

import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import zmq

from tensorfork.errors import ForkCancelled, PeerUnreachable, ResourceExhausted, TensorForkError
from tensorfork.exhaustion import exhausted
from tensorfork.sockets.address import Address, resolve
from tensorfork.sockets.zeromq import poll_timeout

SILENCE = 4.0
"""Seconds in which a host must take a connection. A lost SYN is sent again after 1 s, and again after 3 s: two may be
lost."""
HEAD_START = 0.25
"""Seconds that an address has before the next one is tried beside it, unless it fails sooner (RFC 8305, section 5)."""
MOST = 8
"""Addresses that are tried at once."""
POLL_SECONDS = 0.2
"""Seconds of one poll, at most. Between two polls the caller's `check` is called."""

T = TypeVar("T", covariant=True)


class Attempt(Protocol[T]):
    """One address that is being tried."""

    deadline: float
    """When `advance` must be called, whether or not something has happened."""

    def register(self, poller: zmq.Poller) -> None:
        """Register what is waited for."""

    def advance(self) -> T | None:
        """Go on with what has happened; never waits. The result, which is the caller's from then on; None if there is
        none yet. Raises `TensorForkError` when the address has failed.
        """

    def close(self) -> None:
        """Release everything. Called unless there was a result."""


class AllFailed(Exception):
    """No address answered. `failures` has the error of each."""

    def __init__(self, failures: Mapping[Address, TensorForkError]) -> None:
        super().__init__("; ".join(f"{address.host}: {error}" for address, error in failures.items()))
        self.failures = failures


def race(addresses: Sequence[Address], begin: Callable[[Address], Attempt[T]], check: Callable[[], object]) -> T:
    """The result of the first attempt that has one; the others are closed. Raises `AllFailed`.

    `begin` starts an attempt, and raises as `Attempt.advance` does. `check` is called repeatedly, and may raise.
    `ForkCancelled` and `ResourceExhausted`, which are no address's fault, are raised at once.
    """
    waiting, running = deque(addresses), dict[Address, Attempt[T]]()
    failures: dict[Address, TensorForkError] = {}
    next_start = 0.0
    try:
        while waiting or running:
            check()
            if waiting and len(running) < MOST and (not running or time.monotonic() >= next_start):
                address, next_start = waiting.popleft(), time.monotonic() + HEAD_START
                try:
                    running[address] = begin(address)
                except TensorForkError as error:
                    failures[address] = _address_s_fault(error)
                continue
            _wait(running.values(), next_start if waiting and len(running) < MOST else None)
            for address, attempt in list(running.items()):
                try:
                    result = attempt.advance()
                except TensorForkError as error:
                    failures[address], next_start = _address_s_fault(error), 0.0
                    running.pop(address).close()
                else:
                    if result is not None:
                        del running[address]
                        return result
        raise AllFailed(failures)
    finally:
        for attempt in running.values():
            attempt.close()


def _wait(running: Iterable[Attempt[T]], next_start: float | None) -> None:
    poller = zmq.Poller()
    until = time.monotonic() + POLL_SECONDS
    for attempt in running:
        attempt.register(poller)
        until = min(until, attempt.deadline)
    poller.poll(poll_timeout(until if next_start is None else min(until, next_start)))


def _address_s_fault(error: TensorForkError) -> TensorForkError:
    if isinstance(error, ForkCancelled | ResourceExhausted):
        raise error
    return error


class TCPAttempt:
    """A TCP connection, made to learn whether somebody listens at an address, and closed at once."""

    def __init__(self, address: Address, deadline: float) -> None:
        """Begin. Raises `PeerUnreachable`, whose text is the reason alone, when that is impossible."""
        self.address, self.deadline = address, min(deadline, time.monotonic() + SILENCE)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        try:
            self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise exhausted(error) or PeerUnreachable(_reason(error.errno)) from error
        try:
            code = self._socket.connect_ex((address.host, address.port or 0))
        except OSError as error:  # a text that is no numeric address
            self._socket.close()
            raise PeerUnreachable(str(error)) from error
        if code not in (0, errno.EINPROGRESS):
            self._socket.close()
            raise PeerUnreachable(_reason(code))

    def register(self, poller: zmq.Poller) -> None:
        """See `Attempt`."""
        poller.register(self._socket.fileno(), zmq.POLLOUT)

    def advance(self) -> Address | None:
        """See `Attempt`: the address, once the connection was made."""
        poller = zmq.Poller()
        self.register(poller)
        if poller.poll(0):
            if code := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise PeerUnreachable(_reason(code))
            if self._socket.getsockname() == self._socket.getpeername():  # it was given the port that nobody listens on
                raise PeerUnreachable(_reason(errno.ECONNREFUSED))
            self.close()
            return self.address
        if time.monotonic() >= self.deadline:
            raise PeerUnreachable("nobody answers there")
        return None

    def close(self) -> None:
        """See `Attempt`."""
        self._socket.close()


def reach_port(address: Address, deadline: float, check: Callable[[], object]) -> Address:
    """The numeric address at which somebody listens. Its host may be a name, whose addresses are tried side by side.

    A host that is silent costs `SILENCE` seconds, a port that is closed nothing. Raises `PeerUnreachable`, whose text
    is the reason alone.
    """
    addresses = resolve(address, deadline, check)
    try:
        return race(addresses, lambda one: TCPAttempt(one, deadline), check)
    except AllFailed as error:
        reasons = list(error.failures.values())
        raise PeerUnreachable(str(error) if len(reasons) > 1 else str(reasons[0])) from reasons[0]


def _reason(code: int | None) -> str:
    if code == errno.ECONNREFUSED:
        return "the connection is refused"
    if code == errno.ETIMEDOUT:
        return "nobody answers there"
    return os.strerror(code or 0).lower()
