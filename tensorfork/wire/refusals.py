"""What a seed's refusal is as an error, to a fork and to the seed's own process."""

from tensorfork.errors import (
    PeerRefused,
    ProtocolError,
    SeedAsleep,
    SeedChanged,
    SeedMoved,
    TensorForkError,
    TransportUnavailable,
)
from tensorfork.wire import messages


def error_of(refused: messages.Refused, text: str) -> TensorForkError:
    """The error of the kind that the refusal's code says, with this text."""
    if refused.code == messages.VERSION_CODE:
        return ProtocolError(f"{text}; ours is version {messages.VERSION}")
    if refused.code == messages.UNAVAILABLE:
        return TransportUnavailable(text)
    if refused.code == messages.CHANGED:
        return SeedChanged(text)
    if refused.code == messages.MOVED:
        return SeedMoved(text, tensors=refused.tensors)
    if refused.code == messages.ASLEEP:
        return SeedAsleep(text)
    return PeerRefused(text)
