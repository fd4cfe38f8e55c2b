"""TCP addresses: parsing, looking up names, and which of our own addresses a peer sees."""

import ipaddress
import re
import socket
import threading
import time
from typing import Any

from attrs import frozen

from tensorfork.errors import PeerUnreachable, TransportUnavailable

WILDCARDS = {"0.0.0.0", "*", "::"}

_ADDRESS = re.compile(r"(?:tcp://)?(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\*|\d{1,5})")


@frozen
class Address:
    """A TCP address. `str()` gives the form that ZeroMQ and people use, with IPv6 in brackets."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """From ``tcp://host:port`` or ``host:port``; a port of ``*`` becomes None. Raises `ValueError`."""
        found = _ADDRESS.fullmatch(text)
        port = None if found is None or found["port"] == "*" else int(found["port"])
        if found is None or (port or 0) > 65535 or not (found["host"] or _is_ipv6(found["v6"])):
            raise ValueError(f"{text!r} is not an address; write tcp://host:port, or tcp://[::1]:port for IPv6")
        return cls(found["host"] or found["v6"], port)

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every interface, so that nobody can connect to it."""
        return self.host in WILDCARDS

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{'*' if self.port is None else self.port}"


def _is_ipv6(text: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def resolve(address: Address, deadline: float) -> Address:
    """The address with its host's name looked up, within the deadline (the system's resolver has none).

    Raises `PeerUnreachable` when there is no such host.
    """
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.append(socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
            found.append(error)

    thread = threading.Thread(target=look_up, name="tensorfork-resolve", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    answer = found[0] if found else TimeoutError("no answer from the resolver")
    if isinstance(answer, Exception):
        raise PeerUnreachable(
            f"{address}: no such host (looking up the name): {answer}. Check the address the seed printed."
        ) from answer
    return Address(answer, address.port)


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


def numeric_host(host: str) -> str:
    """A host to bind, as an address. Raises `TransportUnavailable`."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    except OSError as error:
        raise TransportUnavailable(f"{host!r} is no address of this host: {error}") from error
