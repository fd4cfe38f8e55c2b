"""How the two sides of a group find each other: a TCPStore at the seed."""

import datetime
import socket
import time
from collections.abc import Callable
from typing import Any

from tensorfork.errors import TransportUnavailable
from tensorfork.interpreter.limits import require_descriptors
from tensorfork.sockets.address import WILDCARDS, Address, numeric_host
from tensorfork.transports.process_group.tasks import BackgroundTask


def time_left(deadline: float) -> datetime.timedelta:
    """The time until the deadline, as a timeout for torch; at least 1 ms, as torch takes 0 for its default."""
    return datetime.timedelta(milliseconds=max(1, int((deadline - time.monotonic()) * 1000)))


def serve_store(bind: str, ports: range | None, deadline: float) -> tuple[Any, str, int]:
    """A store that listens at the address `bind`, with the host and port at which this process reaches it.

    `ports` are the ports to choose from; None for any free port. Raises `TransportUnavailable`, and `ResourceExhausted`
    where few descriptors are left: torch would end the process.
    """
    require_descriptors()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listener = _listen(bind, ports)
    port = listener.getsockname()[1]
    loopback = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    host = loopback if bind in WILDCARDS else listener.getsockname()[0]
    try:
        store = TCPStore(
            host, port, None, True, time_left(deadline), wait_for_workers=False, master_listen_fd=listener.detach()
        )
    except RuntimeError as error:
        raise TransportUnavailable(f"torch cannot serve a store at {Address(host, port)}: {error}") from error
    return store, host, port


def connect_store(host: str, port: int, deadline: float) -> Any:
    """A client of a store. Releases the GIL while it waits. Raises `TransportUnavailable`."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(host, port, None, False, time_left(deadline), wait_for_workers=False)
    except RuntimeError as error:
        raise TransportUnavailable(
            f"the seed's store at {Address(host, port)} cannot be reached: {_first_line(error)}. Open that port, or "
            "give the seed's transport a range that is open as ports=."
        ) from error


class GroupStores:
    """One side's stores for the groups of one lease: parts of the seed's store, in the same order on both sides.

    Each group has a client of its own. A client that waits for a key blocks everything else that is asked through it,
    and groups that start in different orders on the two sides would wait for each other.

    `check` is called repeatedly while torch connects, and may raise. Raises `TransportUnavailable`, and
    `ResourceExhausted` where few descriptors are left: torch would try again and again.
    """

    def __init__(self, host: str, port: int, token: str, deadline: float, check: Callable[[], object]) -> None:
        require_descriptors()
        self._host, self._port, self._token = host, port, token
        self._taken = 0
        self._clients = [self._connect(deadline, check)]

    def take(self, count: int, deadline: float, check: Callable[[], object]) -> list[Any]:
        """The stores of the next `count` groups. They connect one after another: torch was seen to stall when several
        connect at once.
        """
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        clients, self._clients = self._clients[:count], self._clients[count:]
        clients += [self._connect(deadline, check) for _ in range(count - len(clients))]
        first, self._taken = self._taken, self._taken + count
        return [PrefixStore(f"{self._token}/{number}", client) for number, client in enumerate(clients, first)]

    def announce(self) -> None:
        """Say in the store that it is that of this lease. For the seed, before anybody else knows of the store."""
        self._clients[0].set(self._token, "seed")

    def announced(self) -> bool:
        """Whether the store is that of this lease: a port may lead to another seed's."""
        return bool(self._clients[0].check([self._token]))

    def _connect(self, deadline: float, check: Callable[[], object]) -> Any:
        # The thread keeps nothing of the lease alive while torch retries, however long that takes.
        host, port = self._host, self._port
        task = BackgroundTask(lambda: connect_store(host, port, deadline), lambda _: None, "tensorfork-store")
        return task.result(check)


def _listen(bind: str, ports: range | None) -> socket.socket:
    """A socket that listens on a free port of the range, so that no other process can take the port."""
    host = {"*": "0.0.0.0"}.get(bind, bind)
    host = host if host in WILDCARDS else numeric_host(host)
    dual_stack = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in [0] if ports is None else ports:
        try:
            return socket.create_server((host, port), family=family, backlog=16, dualstack_ipv6=dual_stack)
        except OSError as error:
            if ports is None:
                raise TransportUnavailable(f"the store cannot listen at {host}: {error}") from error
    raise TransportUnavailable(f"no port of {ports} is free at {host}; give a longer range")


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
