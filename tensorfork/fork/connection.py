"""A seed, as a fork sees it: the conversation with it, and what it said in its welcome."""

import time
from types import TracebackType
from typing import Self

from tensorfork.errors import (
    IdentityMismatch,
    ProtocolError,
)
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout
from tensorfork.version import __version__
from tensorfork.wire import messages, tables
from tensorfork.wire.conversation import Conversation

HELLO_TIMEOUT = 10.0
"""Seconds for the first answer, where the timeout is longer: nobody waits minutes for a host that is not there."""


class SeedConnection:
    """A seed, as a fork sees it: the conversation with it, and what it said at its welcome."""

    def __init__(self, address: str, deadline: float) -> None:
        self.address = address
        self.conversation = Conversation(address, min(deadline, time.monotonic() + HELLO_TIMEOUT))
        self.welcome: messages.Welcome

    def greet(self, deadline: float) -> None:
        """Say hello."""
        hello = messages.Hello(__version__)
        soon = min(deadline, time.monotonic() + HELLO_TIMEOUT)
        self.welcome, _ = self.conversation.request(hello, messages.Welcome, soon, "hello")

    def compare(self, identity: Identity | None, rank: Rank | None) -> list[str]:
        """Raise `IdentityMismatch` if it is not what we are; what was not compared, as it was not given."""
        seed, its_rank = tables.unpack_identity(self.welcome)
        differ: dict[str, tuple[object, object]] = {}
        if identity is not None:
            differ |= (seed or Identity()).differences(identity)
        if rank is not None:
            differ |= {"rank": (None, rank)} if its_rank is None else its_rank.differences(rank)
        if differ:
            raise IdentityMismatch(self.address, differ)
        return [what for what, given in (("identity", identity), ("rank", rank)) if given is None]

    def layout(self, deadline: float) -> ModelLayout:
        """Every tensor it has."""
        pages, frames = self.conversation.request(messages.GetLayout(), messages.Pages, deadline, "layout")
        layout = tables.unpack_layout(pages, frames, self.welcome)
        if len(layout.tensors) != self.welcome.tensors or layout.nbytes != self.welcome.nbytes:
            raise ProtocolError(f"{self.address}: the layout is not the one that its welcome announced")
        return layout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.conversation.close()
