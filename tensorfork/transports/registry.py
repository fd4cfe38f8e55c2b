"""The table of transports by name. Other packages add theirs through the entry-point group `tensorfork.transports`.

A transport is imported when it is first used: `import tensorfork` imports none.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tensorfork.errors import TensorForkError, TransportUnavailable
from tensorfork.transports.base import Transport

GROUP = "tensorfork.transports"
BUILT_IN = {
    "cuda_ipc": "tensorfork.transports.cuda_ipc:CudaIpc",
    "transfer_engine": "tensorfork.transports.transfer_engine:TransferEngine",
    "nccl": "tensorfork.transports.process_group:NCCL",
    "gloo": "tensorfork.transports.process_group:Gloo",
    "zeromq": "tensorfork.transports.zeromq:ZeroMQ",
}
AUTO = ("cuda_ipc", "transfer_engine:rdma", "nccl", "zeromq")
"""The order in which `transport="auto"` tries them. Transports of other packages are used only by name."""


def names() -> list[str]:
    """Every name that `load` knows, the built-in ones first."""
    return [*BUILT_IN, *_third_party()]


def load(name: str) -> Transport:
    """A new transport of that name, with its default settings; for ``name:fabric``, one that uses only that fabric.

    Raises:
        TransportUnavailable: there is no such name, its module cannot be imported, or it has no such fabric.
    """
    base_name, _, fabric = name.partition(":")
    factory = _factory(base_name)
    try:
        transport = factory(fabric=fabric) if fabric else factory()
    except (TypeError, ValueError) as error:
        if not fabric:
            raise
        reason = str(error) if isinstance(error, ValueError) else "it has none to choose from"
        raise TransportUnavailable(f"the transport {base_name!r} has no fabric {fabric!r}: {reason}") from error
    if not isinstance(transport, Transport):
        raise TransportUnavailable(
            f"the transport {name!r} made a {type(transport).__name__}, not a tensorfork.Transport"
        )
    return transport


def offered(wanted: Sequence[str | Transport] | None, *, limited: bool = False) -> dict[str, Transport]:
    """The transports that a seed offers, by name: those in `wanted`, or all if it is None.

    With `limited`, the seed has a rate limit, and those over which nobody holds it are not among them. Raises
    `TransportUnavailable` if such a one is in `wanted`, or one that cannot be loaded; `TypeError` if it is a single
    name.
    """
    if isinstance(wanted, str):
        raise TypeError(f"transports must be a sequence of names or transports; write [{wanted!r}]")
    transports: dict[str, Transport] = {}
    for item in names() if wanted is None else wanted:
        try:
            transport = item if isinstance(item, Transport) else load(item)
        except TensorForkError:
            if wanted is not None:
                raise
            continue  # of another package, and broken; whoever names it gets the error
        if limited and transport.rate_limited_by is None:
            if wanted is None:
                continue
            raise TransportUnavailable(
                f"the transport {transport.name!r} cannot hold a seed's rate_limit= (Transport.rate_limited_by); leave "
                "either out"
            )
        transports[transport.name] = transport
    return transports


def _factory(name: str) -> Any:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    entry_point = _third_party().get(name)
    if entry_point is None:
        raise TransportUnavailable(f"there is no transport {name!r}; there are: {', '.join(names())}")
    try:
        return entry_point.load()
    except Exception as error:
        raise TransportUnavailable(
            f"the transport {name!r} of {entry_point.value!r} cannot be imported: {error}. Reinstall what provides it."
        ) from error


def _third_party() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILT_IN}
