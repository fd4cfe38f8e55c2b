"""The table of transports' names, open to others through the entry-point group `tensorfork.transports`.

A transport is imported when it is first asked for: `import tensorfork` loads none.
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
"""The order in which `transport="auto"` tries; third parties' transports are used only by name."""


def names() -> list[str]:
    """Every name that `load` knows, the built-in ones first."""
    return [*BUILT_IN, *_others()]


def load(name: str) -> Transport:
    """A new transport of that name, with its default settings; for ``name:fabric``, one that uses that fabric alone.

    Raises:
        TransportUnavailable: no such name, its module cannot be imported, or it has no such fabric.
    """
    known, _, fabric = name.partition(":")
    factory = _factory(known)
    try:
        made = factory(fabric=fabric) if fabric else factory()
    except (TypeError, ValueError) as error:
        if not fabric:
            raise
        why = str(error) if isinstance(error, ValueError) else "it has none to choose from"
        raise TransportUnavailable(f"the transport {known!r} has no fabric {fabric!r}: {why}") from error
    if not isinstance(made, Transport):
        raise TransportUnavailable(f"the transport {name!r} made a {type(made).__name__}, not a tensorfork.Transport")
    return made


def offered(wanted: Sequence[str | Transport] | None) -> dict[str, Transport]:
    """The transports that a seed offers, by name: those that are wanted, or all.

    Raises `TransportUnavailable` where one that is wanted cannot be loaded, `TypeError` for a single name.
    """
    if isinstance(wanted, str):
        raise TypeError(f"transports must be a sequence of names or transports; write [{wanted!r}]")
    found: dict[str, Transport] = {}
    for one in names() if wanted is None else wanted:
        try:
            transport = one if isinstance(one, Transport) else load(one)
        except TensorForkError:
            if wanted is not None:
                raise
            continue  # a broken one of a third party's; asking for it by name says why
        found[transport.name] = transport
    return found


def _factory(name: str) -> Any:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    other = _others().get(name)
    if other is None:
        raise TransportUnavailable(f"there is no transport {name!r}; there are: {', '.join(names())}")
    try:
        return other.load()
    except Exception as error:
        raise TransportUnavailable(
            f"the transport {name!r} of {other.value!r} cannot be imported: {error}. Reinstall what provides it."
        ) from error


def _others() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILT_IN}
