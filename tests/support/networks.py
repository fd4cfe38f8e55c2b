"""Names with addresses that a test chooses, and hosts that lose packets, spread connections or map one port alone."""

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

PATIENCE = 60.0
NAME = "seed.example"


class Resolver:
    """Answers for `NAME` in place of the system's resolver. `answers` are given in turn, the last one again and again.

    Attributes:
        asked: how often the name was looked up.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *answers: Sequence[str]) -> None:
        self.answers, self.asked = list(answers), 0
        self._system = socket.getaddrinfo
        patch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host != NAME:
            return self._system(host, port, *rest, **options)
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if not answer:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [found for one in answer for found in self._system(one, port, *rest, **options)]


class Forwarder:
    """A port whose connections are carried on to other ports, to each in turn: a virtual IP, or a container's mapped
    port. With `deaf=True` it takes none until `listen` is called: the system then drops each SYN.
    """

    def __init__(self, *targets: tuple[str, int], host: str = "127.0.0.1", port: int = 0, deaf: bool = False) -> None:
        self._targets, self._resources = targets, ExitStack()
        self.accepted = 0
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((host, port))
        self._listener.listen(0 if deaf else 100)
        self.host, self.port = self._listener.getsockname()
        self.address = f"tcp://{host}:{self.port}"
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        if deaf:
            self._filler = socket.create_connection((host, self.port))  # the queue has room for one
            self._open.append(self._filler)
        else:
            self.listen()

    def listen(self) -> None:
        self._start(self._accept)

    def close(self) -> None:
        for one in [self._listener, *self._open]:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # its other end is gone
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for one in [self._listener, *self._open]:
            one.close()

    def __enter__(self) -> "Forwarder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(ours)
            target = self._targets[self.accepted % len(self._targets)]
            self.accepted += 1
            try:
                theirs = socket.create_connection(target)
            except OSError:
                ours.shutdown(socket.SHUT_RDWR)
                continue
            self._open.append(theirs)
            self._start(self._carry, ours, theirs)
            self._start(self._carry, theirs, ours)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


@contextmanager
def silent(host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """A host and a port that answer no SYN."""
    with Forwarder(host=host, deaf=True) as deaf:
        yield host, deaf.port


def closed_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        return int(taken.getsockname()[1])


def wait_for_lost_syn(port: int) -> None:
    """Wait until a connection to the port has sent its SYN, and has no answer."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with open("/proc/net/tcp") as table:
            for line in table.readlines()[1:]:
                _, _, remote, state, *_ = line.split()
                if state == "02" and int(remote.split(":")[1], 16) == port:
                    return
        time.sleep(0.005)
    raise TimeoutError(f"nobody connects to port {port}")


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def needs_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
        pytest.skip(f"no IPv6 loopback here: {error}")
