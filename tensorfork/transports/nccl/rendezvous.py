"""Where the two sides of a group find one another: a TCPStore at the seed, and the addresses that gloo listens at."""

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from tensorfork import cuda
from tensorfork.errors import TransportUnavailable
from tensorfork.sockets import WILDCARDS, Address

T = TypeVar("T")
LOOK = 0.02
"""Seconds between two looks at what may end a wait."""

_environment = threading.Lock()


@contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Inside, these variables are set, for what reads them when it is constructed; afterwards they are as before.

    One thread at a time; keep it short, since other code of this process sees them too.
    """
    with _environment:
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def span(until: float) -> datetime.timedelta:
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
            own, port, None, True, span(until), wait_for_workers=False, master_listen_fd=listening.detach()
        )
    except RuntimeError as error:
        raise TransportUnavailable(f"torch cannot serve a store at {Address(own, port)}: {error}") from error
    return store, own, port


def reach_store(host: str, port: int, until: float) -> Any:
    """A client of a store. Raises `TransportUnavailable`; waits without holding up other threads."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(host, port, None, False, span(until), wait_for_workers=False)
    except RuntimeError as error:
        raise TransportUnavailable(
            f"the seed's store at {Address(host, port)} cannot be reached: {_first_line(error)}. Open that port, or "
            "give the seed's transport a range that is open as ports=."
        ) from error


def local_address(towards: str) -> str:
    """The address of this host from which packets go to another one. Nothing is sent."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))
        except OSError as error:
            raise TransportUnavailable(
                f"this host has no interface from which {towards} is reached: {error}. Check its network."
            ) from error
        found: str = probe.getsockname()[0]
        return found


def numeric(host: str) -> str:
    """A host to bind, as an address. Raises `TransportUnavailable`."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    except OSError as error:
        raise TransportUnavailable(f"{host!r} is no address of this host: {error}") from error


class Task(Generic[T]):
    """Work on a thread of its own, since torch has calls that nothing can interrupt.

    Whoever no longer waits says so; should the work come to its end after all, `discard` is then called with what it
    made.
    """

    def __init__(self, work: Callable[[], T], discard: Callable[[T], object], name: str) -> None:
        self._work, self._discard = work, discard
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._given_up = False
        self._made: list[T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def result(self, look: Callable[[], object]) -> T:
        """What the work made, or raised. `look` is called now and then, and may raise to end the wait."""
        try:
            while not self._over.wait(LOOK):
                look()
        except BaseException:
            self.give_up()
            raise
        if self._error is not None:
            raise self._error
        return self._made[0]

    def give_up(self, seconds: float = 0.0) -> None:
        """Nobody waits any more, but for so many seconds for its end."""
        with self._lock:
            self._given_up = True
            made, self._made = self._made, []
        for one in made:
            self._discard(one)
        if seconds:
            self._over.wait(seconds)

    def _run(self) -> None:
        cuda.relax_capture()
        try:
            made = self._work()
        except BaseException as error:
            self._error = error
        else:
            with self._lock:
                unwanted = self._given_up
                if not unwanted:
                    self._made.append(made)
            if unwanted:
                self._discard(made)
        self._over.set()


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
        reach = Task(lambda: reach_store(self._host, self._port, until), lambda _: None, "tensorfork-join")
        return reach.result(look)


def together(
    works: Iterable[Callable[[], T]], discard: Callable[[T], object], name: str, look: Callable[[], object]
) -> list[T]:
    """What several works made, each on a thread of its own. Should one fail, everything is discarded."""
    tasks = [Task(work, discard, name) for work in works]
    try:
        return [task.result(look) for task in tasks]
    except BaseException:
        for task in tasks:
            task.give_up()
        raise


class Watch:
    """Calls `abort` from a thread of its own, once, with the reason, when it is time: past `until`, or when told to;
    from `begin` on, which is to be called before anything that may hang.

    `until` may be moved at any time. `reason` is empty as long as there was none.
    """

    def __init__(self, until: float, late: str, cancel: threading.Event | None, abort: Callable[[], None]) -> None:
        self.until, self.reason = until, ""
        self._late, self._cancel, self._abort = late, cancel, abort
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorfork-watch", daemon=True)

    def begin(self) -> None:
        """Watch; nothing new where it does."""
        if self._thread.ident is None:
            self._thread.start()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK if self._cancel is not None else 0.1):
            if self._cancel is not None and self._cancel.is_set():
                self.reason = "the transfer was cancelled"
            elif time.monotonic() >= self.until:
                self.reason = self._late
            if self.reason:
                self._abort()
                return


def _listen(bind: str, ports: range | None) -> socket.socket:
    """A listening socket on a free port of the range, so that the port cannot be lost to anybody else."""
    host = {"*": "0.0.0.0"}.get(bind, bind)
    host = host if host in WILDCARDS else numeric(host)
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
