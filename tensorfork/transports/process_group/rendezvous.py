"""Where the two sides of a group find one another: a TCPStore at the seed, and the addresses that gloo listens at."""

import datetime
import socket
import time
from collections.abc import Callable
from typing import Any

from tensorfork.errors import TransportUnavailable
from tensorfork.sockets.address import WILDCARDS, Address, numeric_host
from tensorfork.transports.process_group.tasks import BackgroundTask


def time_left(until: float) -> datetime.timedelta:
    """What is left until then, for torch: never so little that torch would take it for its default."""
    return datetime.timedelta(milliseconds=max(1, int((until - time.monotonic()) * 1000)))


def serve_store(bind: str, ports: range | None, until: float) -> tuple[Any, str, int]:
    """A store that listens where the seed does, and the address and port at which it is reached from here.

    Raises `TransportUnavailable`.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listening = _listen(bind, ports)
    port = listening.getsockname()[1]
    loopback = "::1" if listening.family == socket.AF_INET6 else "127.0.0.1"
    own = loopback if bind in WILDCARDS else listening.getsockname()[0]
    try:
        store = TCPStore(
            own, port, None, True, time_left(until), wait_for_workers=False, master_listen_fd=listening.detach()
        )
    except RuntimeError as error:
        raise TransportUnavailable(f"torch cannot serve a store at {Address(own, port)}: {error}") from error
    return store, own, port


def reach_store(host: str, port: int, until: float) -> Any:
    """A client of a store. Raises `TransportUnavailable`; waits without holding up other threads."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(host, port, None, False, time_left(until), wait_for_workers=False)
    except RuntimeError as error:
        raise TransportUnavailable(
            f"the seed's store at {Address(host, port)} cannot be reached: {_first_line(error)}. Open that port, or "
            "give the seed's transport a range that is open as ports=."
        ) from error


class Stores:
    """What the groups of one lease find one another in: parts of one store, in the same order on either side, each
    through a client of its own. What waits for a key holds up whatever else is said through the same client, and groups
    that begin in another order on either side would wait for each other.

    `look` is called now and then while torch tries, and may raise. Raises `TransportUnavailable`.
    """

    def __init__(self, host: str, port: int, token: str, until: float, look: Callable[[], object]) -> None:
        self._host, self._port, self._token = host, port, token
        self._taken = 0
        self._ready = [self._reach(until, look)]

    def take(self, count: int, until: float, look: Callable[[], object]) -> list[Any]:
        """The next so many. They connect one after another: torch was seen to stall where several do."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        clients, self._ready = self._ready[:count], self._ready[count:]
        clients += [self._reach(until, look) for _ in range(count - len(clients))]
        first, self._taken = self._taken, self._taken + count
        return [PrefixStore(f"{self._token}/{number}", client) for number, client in enumerate(clients, first)]

    def _reach(self, until: float, look: Callable[[], object]) -> Any:
        # on a thread that holds on to nothing of ours while torch retries, however long that is
        reach = BackgroundTask(lambda: reach_store(self._host, self._port, until), lambda _: None, "tensorfork-join")
        return reach.result(look)


def _listen(bind: str, ports: range | None) -> socket.socket:
    """A listening socket on a free port of the range, so that the port cannot be lost to anybody else."""
    host = {"*": "0.0.0.0"}.get(bind, bind)
    host = host if host in WILDCARDS else numeric_host(host)
    both = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in [0] if ports is None else ports:
        try:
            return socket.create_server((host, port), family=family, backlog=16, dualstack_ipv6=both)
        except OSError as error:
            if ports is None:
                raise TransportUnavailable(f"it cannot listen at {host}: {error}") from error
    raise TransportUnavailable(f"no port of {ports} is free at {host}; give a longer range")


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
