"""The fork's end of a lease's channel."""

from tensorfork.errors import ForkCancelled, LeaseEnded, PeerUnreachable
from tensorfork.sockets.address import Address
from tensorfork.wire.conversation import Conversation


class ForkChannel:
    """The fork's end of a lease's channel; a `tensorfork.transports.base.Channel`. To it, a fork that is cancelled has
    ended its lease. `share` is what was granted with the lease, in bytes a second.
    """

    def __init__(self, conversation: Conversation, lease: bytes, share: float | None = None) -> None:
        self._conversation, self._lease, self._share = conversation, lease, share

    @property
    def rate_limit(self) -> float | None:
        """See `tensorfork.transports.base.Channel`."""
        return self._conversation.share(self._lease, self._share)

    @property
    def seed(self) -> Address:
        """See `tensorfork.transports.base.Channel`."""
        return self._conversation.resolved

    def send(self, message: bytes, deadline: float) -> None:
        """See `tensorfork.transports.base.Channel`."""
        try:
            self._conversation.send(self._lease, message, deadline)
        except ForkCancelled as error:
            raise LeaseEnded(str(error)) from error

    def recv(self, deadline: float) -> bytes:
        """See `tensorfork.transports.base.Channel`."""
        try:
            return self._conversation.recv(self._lease, deadline)
        except ForkCancelled as error:
            raise LeaseEnded(str(error)) from error

    def check(self) -> None:
        """See `tensorfork.transports.base.Channel`."""
        try:
            self._conversation.check_cancelled("open")
            self._conversation.check_there("open")
        except (ForkCancelled, PeerUnreachable) as error:
            raise LeaseEnded(str(error)) from error
