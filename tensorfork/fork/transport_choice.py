"""Which transport to use: those that the caller asks for, and the reasons against each."""

from collections.abc import Sequence

from tensorfork.errors import TensorForkError, TransportUnavailable
from tensorfork.exhaustion import exhausted
from tensorfork.fork.connection import SeedConnection
from tensorfork.regions import Region
from tensorfork.transports import registry
from tensorfork.transports.base import Transport


def transports_to_try(wanted: str | Transport) -> tuple[Transport, ...]:
    """The transports to try, in order. Raises `TypeError`, or `TransportUnavailable` for an unknown name."""
    if isinstance(wanted, Transport):
        return (wanted,)
    if not isinstance(wanted, str):
        raise TypeError(f"transport must be a name or a Transport, not {type(wanted).__name__}")
    return tuple(registry.load(name) for name in (registry.AUTO if wanted == "auto" else (wanted,)))


def reason_against(transport: Transport, seed: SeedConnection, regions: Sequence[Region]) -> str | None:
    """Why a transport cannot be used between this process and the seed; None if it can be tried."""
    offered = seed.welcome.transports.get(transport.name)
    if offered is None:
        return f"the seed does not offer it; it offers: {', '.join(seed.welcome.transports) or 'nothing'}"
    if offered.why_not is not None:
        return f"the seed cannot: {offered.why_not}"
    try:
        return transport.why_not(transport.facts(regions), offered.facts)
    except TransportUnavailable as error:
        return str(error)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # facts of another shape
        return f"what the seed says of it makes no sense: {error!r}"
    except Exception as error:
        if isinstance(error, TensorForkError) or exhausted(error):
            raise
        return f"it failed to say whether it can work here: {error!r}"
