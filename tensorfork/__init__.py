"""Fork a model's weights from a running process, GPU to GPU.

seed = tensorfork.publish(model)                      # in the running instance
report = tensorfork.fork_into(model, seed.address)    # in the new one
"""

from tensorfork.interpreter.garbage_collection import gc_paused as _gc_paused

with _gc_paused():  # behind torch a collection is due, which would double the time of this import
    from tensorfork.api import digests, fork, fork_into, publish
    from tensorfork.digest.record import Digests
    from tensorfork.errors import (
        ForkCancelled,
        IdentityMismatch,
        LayoutMismatch,
        LeaseEnded,
        MemoryInUse,
        PeerRefused,
        PeerUnreachable,
        ProtocolError,
        ResourceExhausted,
        SeedAsleep,
        SeedChanged,
        SeedMoved,
        TensorForkError,
        TransferFailed,
        TransportUnavailable,
        UnsupportedTensor,
        ValueMismatch,
        VerificationFailed,
        VersionMismatch,
    )
    from tensorfork.identity import Identity, Rank
    from tensorfork.interpreter.settings import allow_process_settings
    from tensorfork.layout import ModelLayout, StorageLayout, TensorLayout
    from tensorfork.lineage import Version
    from tensorfork.model.value_policy import ValuePolicy
    from tensorfork.placement import Placement
    from tensorfork.regions import Copy, Place, Region, RemoteRegion
    from tensorfork.report import DifferentValues, ForkReport, ValueReport
    from tensorfork.seed.handle import Seed
    from tensorfork.seed.leases import SeedStats
    from tensorfork.transports.base import Channel, Export, Facts, Session, Site, Transport
    from tensorfork.transports.rate_limit import RateLimiter
    from tensorfork.version import __version__

__all__ = [
    "Channel",
    "Copy",
    "DifferentValues",
    "Digests",
    "Export",
    "Facts",
    "ForkCancelled",
    "ForkReport",
    "Identity",
    "IdentityMismatch",
    "LayoutMismatch",
    "LeaseEnded",
    "MemoryInUse",
    "ModelLayout",
    "PeerRefused",
    "PeerUnreachable",
    "Place",
    "Placement",
    "ProtocolError",
    "Rank",
    "RateLimiter",
    "Region",
    "RemoteRegion",
    "ResourceExhausted",
    "Seed",
    "SeedAsleep",
    "SeedChanged",
    "SeedMoved",
    "SeedStats",
    "Session",
    "Site",
    "StorageLayout",
    "TensorForkError",
    "TensorLayout",
    "TransferFailed",
    "Transport",
    "TransportUnavailable",
    "UnsupportedTensor",
    "ValueMismatch",
    "ValuePolicy",
    "ValueReport",
    "VerificationFailed",
    "Version",
    "VersionMismatch",
    "__version__",
    "allow_process_settings",
    "digests",
    "fork",
    "fork_into",
    "publish",
]
