"""TCP addresses: parsing them, looking up host names, and the local address that faces a peer."""

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from tensorfork.errors import PeerUnreachable, TransportUnavailable
from tensorfork.exhaustion import exhausted

CHECK_SECONDS = 0.1
"""Seconds between two checks whether a name is still wanted that is being looked up."""

WILDCARDS = {"0.0.0.0", "*", "::"}

_ADDRESS = re.compile(r"(?:tcp://)?(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\*|\d{1,5})")


@frozen
class Address:
    """A TCP address. `str()` gives ``tcp://host:port``, with IPv6 in brackets; a port of None becomes ``*``."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse ``tcp://host:port`` or ``host:port``; a port of ``*`` becomes None. Raises `ValueError`."""
        found = _ADDRESS.fullmatch(text)
        port = None if found is None or found["port"] == "*" else int(found["port"])
        if found is None or (port or 0) > 65535 or not (found["host"] or _is_ipv6(found["v6"])):
            raise ValueError(f"{text!r} is not an address; write tcp://host:port, or tcp://[::1]:port for IPv6")
        return cls(found["host"] or found["v6"], port)

    @property
    def is_wildcard(self) -> bool:
        """Whether it means every interface: an address to bind, and none to connect to."""
        return self.host in WILDCARDS

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{'*' if self.port is None else self.port}"


def _is_ipv6(text: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def resolve(address: Address, deadline: float, check: Callable[[], object] = lambda: None) -> Sequence[Address]:
    """Look up the host's name, on a thread, since the system's resolver has no deadline. All of its addresses, in the
    resolver's order, each once; at least one.

    `check` is called while waiting, and may raise. Raises `PeerUnreachable` when there is no such host, or no answer by
    the deadline.
    """
    results: list[Any] = []

    def look_up() -> None:
        try:
            results.append(socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM))
        except Exception as error:  # UnicodeError, for one, for a text that cannot be a host's name
            results.append(error)

    thread = threading.Thread(target=look_up, name="tensorfork-resolve", daemon=True)
    thread.start()
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        check()
        thread.join(min(CHECK_SECONDS, left))
    result = results[0] if results else TimeoutError("no answer from the resolver")
    if isinstance(result, Exception):
        if found := exhausted(result):
            raise found from result
        raise PeerUnreachable(
            f"{address}: no such host (looking up the name): {result}. Check the address the seed printed."
        ) from result
    return [Address(host, address.port) for host in dict.fromkeys(found[4][0] for found in result)]


def local_address(towards: str) -> str:
    """The address of this host that packets to `towards` carry as their source. Nothing is sent.

    Raises `TransportUnavailable` when no interface leads there.
    """
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))
        except OSError as error:
            raise TransportUnavailable(
                f"this host has no interface from which {towards} is reached: {error}. Check its network."
            ) from error
        local: str = probe.getsockname()[0]
        return local


def numeric_host(host: str) -> str:
    """The numeric address of a host to bind. Raises `TransportUnavailable` when there is none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    except OSError as error:
        raise TransportUnavailable(f"{host!r} is no address of this host: {error}") from error
