"""The connection to a seed, and what the seed said of itself in its welcome."""

import time
from threading import Event
from types import TracebackType
from typing import Self

from tensorfork.errors import IdentityMismatch, ProtocolError, VersionMismatch
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout
from tensorfork.lineage import AtLeast, Version, Wanted, why_not_wanted
from tensorfork.version import __version__
from tensorfork.wire import messages, tables
from tensorfork.wire.conversation import Conversation

HELLO_TIMEOUT = 10.0
"""Seconds for the first reply, even where the timeout is longer: nobody waits minutes for a host that is not there."""


class SeedConnection:
    """The connection to a seed. `welcome` is there after `greet`."""

    def __init__(self, address: str, deadline: float, cancel: Event) -> None:
        self.address, self._cancel = address, cancel
        self.conversation = Conversation(address, min(deadline, time.monotonic() + HELLO_TIMEOUT), cancel)
        self.welcome: messages.Welcome

    @property
    def cancelled(self) -> bool:
        """Whether the caller has cancelled the fork."""
        return self._cancel.is_set()

    def greet(self, deadline: float) -> None:
        """Say hello, and keep the seed's welcome. Raises `PeerUnreachable`, also after `HELLO_TIMEOUT` seconds."""
        hello = messages.Hello(__version__)
        soon = min(deadline, time.monotonic() + HELLO_TIMEOUT)
        self.welcome, _ = self.conversation.request(hello, messages.Welcome, soon, "hello")

    def compare(self, identity: Identity | None, rank: Rank | None) -> list[str]:
        """Compare the seed's identity and rank with ours. One that is None is not compared; returns the names of those.

        Raises `IdentityMismatch` with every field that differs.
        """
        seed_identity, seed_rank = tables.unpack_identity(self.welcome)
        different: dict[str, tuple[object, object]] = {}
        if identity is not None:
            different |= (seed_identity or Identity()).differences(identity)
        if rank is not None:
            different |= {"rank": (None, rank)} if seed_rank is None else seed_rank.differences(rank)
        if different:
            raise IdentityMismatch(self.address, different)
        return [name for name, given in (("identity", identity), ("rank", rank)) if given is None]

    def check_version(
        self, wanted: Wanted, at_least: AtLeast, packed: messages.WeightsVersion | None = None
    ) -> Version:
        """The version of a lease, by default that of the welcome. Raises `VersionMismatch` if it will not do."""
        version = tables.unpack_version(packed or self.welcome.version)
        if why_not := why_not_wanted(version, wanted, at_least):
            raise VersionMismatch(f"{self.address}: {why_not}. Fork from another seed, or later")
        return version

    def layout(self, deadline: float) -> ModelLayout:
        """The seed's layout: every tensor that it has published, as of its welcome.

        Raises `SeedChanged` where it has published others since.
        """
        request = messages.GetLayout(self.welcome.publication)
        pages, frames = self.conversation.request(request, messages.Pages, deadline, "layout")
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
