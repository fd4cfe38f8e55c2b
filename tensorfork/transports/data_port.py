"""Reaching the port that a seed serves a lease on, beside the one of its address."""

from tensorfork.errors import LeaseEnded, PeerUnreachable, TransportUnavailable
from tensorfork.sockets.address import Address
from tensorfork.sockets.race import reach_port
from tensorfork.transports.base import Channel

NOT_THIS_SEED = "what listens there is not the seed that granted the lease"
"""Why the wrong process is found on such a port."""

PORTS = "give the seed's transport a range that is open, or mapped to the same numbers, as ports="
"""What helps where a transport has that argument."""


def reach_data_port(transport: str, host: str, port: int, channel: Channel, deadline: float, remedy: str) -> Address:
    """The numeric address of the port, once it has taken a connection, which is closed again.

    Raises `TransportUnavailable`: at once where the port is closed, after 4 s where there is silence, or when the fork
    is cancelled. Its cause is the `PeerUnreachable` that says why.
    """
    try:
        return reach_port(Address(host, port), deadline, channel.check)
    except LeaseEnded as error:
        raise TransportUnavailable(str(error)) from None
    except PeerUnreachable as error:
        raise unreached(transport, Address(host, port), error, remedy) from error


def unreached(transport: str, at: Address, why: object, remedy: str = PORTS) -> TransportUnavailable:
    """The error, with what to do. It is to be raised from a `PeerUnreachable`."""
    return TransportUnavailable(
        f"{transport}: port {at.port} at {at.host}, on which the seed serves this lease, cannot be reached: {why}. "
        "Forks need that port beside the one of the seed's address, also where a container or a gateway maps ports: "
        f"{remedy}; or use another transport"
    )
