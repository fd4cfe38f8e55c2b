"""Where a seed listens, and by which address forks reach it."""

from typing import Any

from tensorfork.sockets.address import Address

Advertised = tuple[str, int | None] | None
"""A host by which forks reach the seed, and a port if it is another than the seed's; None where neither was given."""


def listening_address(bind: Any, advertise: Any) -> tuple[Address, Advertised]:
    """`bind` and `advertise` of `tensorfork.publish`, parsed: the latter as a host, and a port if it has one.

    Raises `TypeError` for what is no text, `ValueError` for what is no address, or is every interface and has no other.
    """
    for name, text in {"bind": bind, "advertise": "*" if advertise is None else advertise}.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} must be an address, such as tcp://10.0.0.7:4180, not {type(text).__name__}")
    bound = Address.parse(bind)
    advertised = None if advertise is None else _parse_advertised(advertise)
    if bound.is_wildcard and advertised is None:
        raise ValueError(f"bind={bind!r} is every interface; say with advertise= by which address forks reach it")
    return bound, advertised


def _parse_advertised(text: str) -> tuple[str, int | None]:
    """The host and the port of `publish(advertise=)`; the port is None where only a host is given."""
    bare = text.removeprefix("tcp://")
    for form in (text, f"{bare}:*", f"[{bare}]:*"):
        try:
            address = Address.parse(form)
        except ValueError:
            continue
        if not address.is_wildcard:
            return address.host, address.port
    raise ValueError(f"advertise={text!r} is not an address by which forks can come; give a host, or host:port")
