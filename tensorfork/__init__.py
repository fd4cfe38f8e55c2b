"""Fork a model's weights from a running process, GPU to GPU.

seed = tensorfork.publish(model)                      # in the running instance
report = tensorfork.fork_into(model, seed.address)    # in the new one
"""

from tensorfork.api import fork, fork_into, publish
from tensorfork.errors import (
    IdentityMismatch,
    LayoutMismatch,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    SeedChanged,
    TensorForkError,
    TransferFailed,
    TransportUnavailable,
    UnsupportedTensor,
    VerificationFailed,
)
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout, StorageLayout, TensorLayout
from tensorfork.placement import Placement
from tensorfork.report import ForkReport
from tensorfork.seed import Seed, SeedStats
from tensorfork.transports.base import (
    Channel,
    Copy,
    Export,
    Facts,
    Place,
    Region,
    RemoteRegion,
    Session,
    Site,
    Transport,
)
from tensorfork.version import __version__

__all__ = [
    "Channel",
    "Copy",
    "Export",
    "Facts",
    "ForkReport",
    "Identity",
    "IdentityMismatch",
    "LayoutMismatch",
    "ModelLayout",
    "PeerRefused",
    "PeerUnreachable",
    "Place",
    "Placement",
    "ProtocolError",
    "Rank",
    "Region",
    "RemoteRegion",
    "Seed",
    "SeedChanged",
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
    "VerificationFailed",
    "__version__",
    "fork",
    "fork_into",
    "publish",
]
