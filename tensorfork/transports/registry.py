"""The table of transports' names, open to others through the entry-point group `tensorfork.transports`.

A transport is imported when it is first asked for: `import tensorfork` loads none.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tensorfork.errors import TransportUnavailable
from tensorfork.transports.base import Transport

GROUP = "tensorfork.transports"
BUILT_IN = {
    "cuda_ipc": "tensorfork.transports.cuda_ipc:CudaIpc",
    "nccl": "tensorfork.transports.nccl:NCCL",
    "gloo": "tensorfork.transports.nccl:Gloo",
    "zeromq": "tensorfork.transports.zeromq:ZeroMQ",
}
AUTO = ("cuda_ipc", "nccl", "zeromq")
"""The order in which `transport="auto"` tries; third parties' transports are used only by name."""


def names() -> list[str]:
    """Every name that `load` knows, the built-in ones first."""
    return [*BUILT_IN, *_others()]


def load(name: str) -> Transport:
    """A new transport of that name, with its default settings.

    Raises:
        TransportUnavailable: no such name, or its module cannot be imported.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        factory: Any = getattr(import_module(module), attribute)
    elif other := _others().get(name):
        try:
            factory = other.load()
        except Exception as error:
            raise TransportUnavailable(
                f"the transport {name!r} of {other.value!r} cannot be imported: {error}. Reinstall what provides it."
            ) from error
    else:
        raise TransportUnavailable(f"there is no transport {name!r}; there are: {', '.join(names())}")
    made = factory()
    if not isinstance(made, Transport):
        raise TransportUnavailable(f"the transport {name!r} made a {type(made).__name__}, not a tensorfork.Transport")
    return made


def _others() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILT_IN}
