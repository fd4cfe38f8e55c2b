"""The connection to a seed, and what the seed said of itself in its welcome."""

import time
from collections.abc import Callable
from threading import Event
from types import TracebackType
from typing import Self

from tensorfork.errors import (
    ForkCancelled,
    IdentityMismatch,
    PeerUnreachable,
    ProtocolError,
    TensorForkError,
    VersionMismatch,
)
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout
from tensorfork.lineage import AtLeast, Version, Wanted, why_not_wanted
from tensorfork.model.values import MAX_VALUES
from tensorfork.sockets.address import Address
from tensorfork.version import __version__
from tensorfork.wire import messages, tables
from tensorfork.wire.conversation import Conversation, peer_address
from tensorfork.wire.reach import HELLO_TIMEOUT, greet, hello_again, look_up

SPREAD_PROBES = 8
"""Connections that are made to find out whether they reach several seeds. Of two, 1 time in 256 they miss the other."""
RETRY_PAUSE = 0.05, 0.5
"""Seconds between two attempts to reach a seed that may still be starting: at first, and at most."""


class SeedConnection:
    """The connection to a seed, at the address that answered its hello, and the seed's welcome."""

    def __init__(
        self,
        address: str,
        deadline: float,
        cancel: Event,
        wait_until: float = 0.0,
        enter: Callable[[str], object] = lambda phase: None,
        *,
        stall: float,
    ) -> None:
        """Reach the seed. Until the moment `wait_until`, try again when nobody answers: it may still be starting. The
        name is looked up anew each time. `enter` is called with the name of each phase that begins. `stall` is the
        conversation's.

        Raises `ValueError` for a bad address, `PeerUnreachable`, `ProtocolError` and `ForkCancelled`.
        """
        self.address, self._cancel, self._stall, self._deadline = address, cancel, stall, deadline
        self.conversation, self.welcome = self._reach(peer_address(address), deadline, wait_until, enter)
        self._expect_layout()
        self._is_new = True

    def _reach(
        self, peer: Address, deadline: float, wait_until: float, enter: Callable[[str], object]
    ) -> tuple[Conversation, messages.Welcome]:
        pause, longest = RETRY_PAUSE
        while True:
            enter("resolve")
            try:
                addresses = look_up(peer, deadline, self._cancel)
                enter("hello")
                return greet(peer, addresses, deadline, self._cancel, self._stall)
            except PeerUnreachable as error:
                if time.monotonic() + pause >= min(deadline, wait_until):
                    if pause > RETRY_PAUSE[0]:
                        error.add_note("The fork tried again and again for as long as wait= and its timeout allow")
                    raise
                if self._cancel.wait(pause):
                    raise
            pause = min(longest, 2 * pause)

    @property
    def cancelled(self) -> bool:
        """Whether the caller has cancelled the fork."""
        return self._cancel.is_set()

    def check(self) -> None:
        """Raise `ForkCancelled` once the fork is cancelled, and `PeerUnreachable` at its deadline: for what we compute
        ourselves, of what the seed has announced.
        """
        if self._cancel.is_set():
            raise ForkCancelled(f"{self.address}: the fork was cancelled")
        if time.monotonic() >= self._deadline:
            raise PeerUnreachable(
                f"{self.address}: the fork's timeout passed while it worked through the seed's layout, of "
                f"{self.welcome.tensors:,} tensors in {self.welcome.storages:,} storages. Allow more time, if that is "
                "what the seed should have"
            )

    def greet(self, deadline: float) -> None:
        """Ask for the seed's welcome anew, unless it has just come. Raises `PeerUnreachable`, also after
        `HELLO_TIMEOUT` seconds.
        """
        if not self._is_new:
            soon = min(deadline, time.monotonic() + HELLO_TIMEOUT)
            self.welcome, _ = self.conversation.request(messages.Hello(__version__), messages.Welcome, soon, "hello")
            self._expect_layout()
        self._is_new = False

    def _expect_layout(self, more: int = 0) -> None:
        welcome = self.welcome
        self.conversation.expect_rows(welcome.tensors + welcome.storages + welcome.left_out + more)

    def expect_values(self) -> None:
        """The seed's plain values are asked for, of which there may be `MAX_VALUES`."""
        self._expect_layout(MAX_VALUES)

    def why_spread(self, deadline: float) -> str | None:
        """What is wrong with the address, if further connections to it reach other seeds; None if they do not."""
        peer, at = self.conversation.peer, self.conversation.resolved
        try:
            found = (hello_again(peer, at, deadline, self._cancel) for _ in range(SPREAD_PROBES))
            spread = any(welcome.seed != self.welcome.seed for welcome in found)
        except TensorForkError:
            return None
        if not spread:
            return None
        return (
            f"{self.address} is the address of several seeds: connections to {at.host} are spread over them, as by a "
            "virtual IP or a load balancer, and a fork makes several. Give it the address of one seed, such as a pod's "
            "own, or a name that has all of these (a headless service)"
        )

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
        layout = tables.unpack_layout(pages, frames, self.welcome, self.check)
        if len(layout.tensors) != self.welcome.tensors or layout.nbytes != self.welcome.nbytes:
            raise ProtocolError(f"{self.address}: the layout is not the one that its welcome announced")
        return layout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.conversation.close()
