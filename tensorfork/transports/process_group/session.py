"""The fork's side of a lease: it creates the groups, divides copies into batches, and receives them."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import Event
from typing import Any

import msgpack
from attrs import evolve

from tensorfork.errors import (
    LeaseEnded,
    PeerUnreachable,
    ProtocolError,
    TensorForkError,
    TransferFailed,
    TransportUnavailable,
)
from tensorfork.interpreter import process
from tensorfork.regions import Copy, Region, RemoteRegion
from tensorfork.sockets.address import local_address
from tensorfork.transports.base import Channel, Session
from tensorfork.transports.checks import check_going_on
from tensorfork.transports.data_port import NOT_THIS_SEED, PORTS, reach_data_port, unreached
from tensorfork.transports.process_group.backends import create_group
from tensorfork.transports.process_group.batches import Batch, schedule
from tensorfork.transports.process_group.messages import MessageChannel
from tensorfork.transports.process_group.pair_group import FORK, CtaLimits, PairGroup, Settings
from tensorfork.transports.process_group.receiver import BatchReceiver
from tensorfork.transports.process_group.region_tensors import RegionTensors, contains
from tensorfork.transports.process_group.rendezvous import GroupStores
from tensorfork.transports.process_group.tasks import BackgroundTask, Watchdog, run_together

MAX_NETWORK_BATCH = 128 << 20
"""Bytes of a batch between hosts, at most: the seed aborts one that takes longer than `stall`, as if the fork had
stopped, and networks may be slow."""
CLOSE_WAIT = 2.0
"""Seconds that `close` waits for a group being created: the thread uses our memory, and cannot be interrupted."""
DRAIN_TIMEOUT = 2.0
"""Seconds that a GPU is given to stop writing after an abort."""

REASON_WAIT = 0.2
"""Seconds in which the seed may say why a group could not be created."""

_undrained: list[tuple[PairGroup, Any]] = []
"""Operations by which a GPU may still be writing; kept for ever, since nothing says when it stops."""


class GroupSession(Session):
    """One lease, as the fork sees it.

    Args:
        offer: the seed's.
        settings: the fork's; for each size, the smaller of the two sides' counts.
        transport: its name, for errors.
        host: the seed's host name or address.
        remote: the seed's regions.
        regions: the fork's regions.
        channel: the lease's.
        joining: seconds that creating groups may take.
        deadline: by when the seed's store must be reached, and a first group created.
    """

    def __init__(
        self,
        offer: bytes,
        settings: Settings,
        transport: str,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        joining: float,
        deadline: float,
    ) -> None:
        token, port, self._settings, same_host = _parse_offer(offer, settings)
        self.fabric = "tcp" if not settings.nccl else "p2p" if same_host else "network"
        self._joining = joining
        self._remote = {region.id: region for region in remote}
        self._regions = RegionTensors(regions)
        self._channel = MessageChannel(channel)
        self._groups: list[PairGroup] = []
        self._pairs: list[tuple[str, str]] = []  # the devices of each group, the seed's first
        self._broken = False
        self._closed = Event()
        pairs = [(theirs, ours) for theirs in {region.device for region in remote} for ours in self._regions.devices]
        self._early_pairs = pairs if len(pairs) == 1 else []  # with several, the copies say which are needed
        deadline = min(deadline, time.monotonic() + joining)
        store = reach_data_port(transport, host, port, channel, deadline, PORTS)
        self._seed = store.host
        self._stores: GroupStores | None = GroupStores(store.host, port, token, deadline, self._going_on(deadline))
        if not self._stores.announced():
            error = PeerUnreachable(NOT_THIS_SEED)
            raise unreached(transport, store, error) from error
        self._early_join: BackgroundTask[list[PairGroup]] | None = None
        if self._early_pairs:
            join = partial(self._join, self._early_pairs, deadline, self._check_open)
            self._early_join = BackgroundTask(join, _close_all, "tensorfork-join")

    def ready(self, deadline: float) -> None:
        """See `Session.ready`: waits for the group, if one will do. NCCL takes half a second to create it."""
        if self._early_join is None:
            return
        try:
            self._groups = self._early_join.result(self._going_on(min(deadline, time.monotonic() + self._joining)))
        except BaseException:
            self.close(deadline)
            raise
        self._early_join, self._pairs = None, list(self._early_pairs)

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`. After a failure, every later pull of this session fails."""
        if self._broken:
            raise TransferFailed("this connection failed before; open another session")
        check_going_on(deadline, cancel)
        self.ready(deadline)
        pairs = self._early_pairs or self._pairs_of(copies)
        self._broken = True  # until the pull has succeeded
        with Watchdog(deadline, "not everything had arrived by the deadline", cancel, self._abort) as watchdog:
            receiver = BatchReceiver(self._channel, watchdog, cancel, deadline, done)
            try:
                if missing := sorted(set(pairs) - set(self._pairs)):
                    watchdog.start()
                    join_deadline = min(deadline, time.monotonic() + self._joining)
                    self._groups += self._join(missing, join_deadline, receiver.check)
                    self._pairs += missing
                receiver.receive(copies, self._batches(copies, pairs), self._groups)
            except BaseException as error:
                undrained = self._drain(receiver)
                if error is receiver.callback_error or not isinstance(error, RuntimeError | TensorForkError):
                    raise
                raise TransferFailed(f"{self._seed}: {receiver.failure_reason(error)}", undrained=undrained) from error
        self._broken = bool(watchdog.reason)  # the groups may have been aborted just after the last batch

    def close(self, deadline: float) -> None:
        """See `Session.close`."""
        self._closed.set()
        if self._early_join is not None:
            self._early_join.abandon(CLOSE_WAIT)
        groups, self._groups, self._stores, self._early_join = self._groups, [], None, None
        idle, self._broken = not self._broken, True  # idle: there was no pull, or the last one succeeded
        for group in groups:
            group.close(idle)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise TransferFailed("this session is closed")

    def _going_on(self, deadline: float) -> Callable[[], None]:
        """A function that raises `TransportUnavailable` once the deadline has passed, or the fork is cancelled."""

        def check() -> None:
            try:
                self._channel.check()
            except LeaseEnded as error:
                raise TransportUnavailable(str(error)) from error
            if time.monotonic() >= deadline:
                raise TransportUnavailable(
                    "the two sides did not find one another in time; check that the seed's ports can be reached"
                )

        return check

    def _join(self, pairs: Sequence[tuple[str, str]], deadline: float, check: Callable[[], object]) -> list[PairGroup]:
        """Create a group for each of these pairs of devices, all at once.

        `check` is called repeatedly, and may raise. Raises `TransportUnavailable`, and leaves no group behind. Before
        the first pull this runs on a thread of its own, and no other thread uses the channel meanwhile.
        """
        check_time = self._going_on(deadline)
        ctas = self._settings.ctas
        groups: list[PairGroup] = []

        def check_both() -> None:
            check_time()
            check()

        stores = self._stores
        try:
            check()
            if stores is None:
                raise TransferFailed("this session is closed")
            address = local_address(self._seed)
            limits = [ctas.min_ctas, ctas.max_ctas, ctas.cga_cluster_size]
            self._channel.send("join", pairs, limits, address, deadline=deadline)
            self._expect("ready", deadline, check)
            creations = [
                partial(create_group, pair, store, FORK, self._regions, self._settings, address, deadline)
                for pair, store in zip(pairs, stores.take(len(pairs), deadline, check_both), strict=True)
            ]
            groups = run_together(creations, PairGroup.close, "tensorfork-group", check_both)
            self._expect("joined", deadline, check)
            return groups
        except BaseException as error:
            _close_all(groups)
            if isinstance(error, RuntimeError | PeerUnreachable | TransferFailed):
                why = self._failure_at_seed() if isinstance(error, RuntimeError) else None
                raise TransportUnavailable(f"no group with {self._seed} could be created: {why or error}") from error
            raise

    def _failure_at_seed(self) -> str | None:
        """What the seed says of a group that could not be created; None if it says nothing soon."""
        try:
            message = self._channel.try_recv(time.monotonic() + REASON_WAIT)
        except (PeerUnreachable, ProtocolError):
            return None
        return f"the seed says: {str(message[-1])[:4096]}" if message and message[0] == "failed" else None

    def _expect(self, word: str, deadline: float, check: Callable[[], object]) -> None:
        """Wait for the seed's next message, which must begin with this word."""
        message = self._channel.recv(deadline, check)
        if message[0] == "failed":
            raise TransferFailed(f"the seed says: {str(message[-1])[:4096]}")
        if message[0] != word:
            raise ProtocolError(f"the seed said {message[0][:20]!r} where {word!r} is expected")

    def _pairs_of(self, copies: Sequence[Copy]) -> list[tuple[str, str]]:
        """The two devices of each copy. Raises `TransferFailed` if a region does not exist."""
        try:
            return [(self._remote[copy.region].device, self._regions.device_of(copy.into)) for copy in copies]
        except KeyError as error:
            raise TransferFailed(f"a copy names region {error}, which does not exist") from error

    def _batches(self, copies: Sequence[Copy], pairs: Sequence[tuple[str, str]]) -> Iterator[Batch]:
        """The batches for these copies, each checked before it is yielded. `pairs` are the two devices of each copy,
        or one pair for all.
        """
        index = {pair: i for i, pair in enumerate(self._pairs)}
        groups = [0] * len(copies) if self._early_pairs else [index[pair] for pair in pairs]
        limits = {i: self._settings.limits(pair) for i, pair in enumerate(self._pairs)}
        return self._checked(schedule(copies, groups, limits))

    def _checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches. Raises `TransferFailed` at one that is not within the regions of both sides."""
        for batch in batches:
            theirs, ours = self._pairs[batch.group]
            if not all(contains(self._remote, one, theirs) for one in batch.sources):
                raise TransferFailed("a copy lies outside the seed's regions")
            if not all(self._regions.contains(one, ours) for one in batch.destinations):
                raise TransferFailed("a copy lies outside our regions")
            yield batch

    def _abort(self) -> None:
        for group in self._groups:
            group.abort()

    def _drain(self, receiver: BatchReceiver) -> list[tuple[int, int]]:
        """Abort all groups and wait until nothing is written any more, `DRAIN_TIMEOUT` at most.

        Returns the memory that may be written to all the same, as (address, bytes). Its operations are kept for ever.
        """
        self._abort()
        end = time.monotonic() + DRAIN_TIMEOUT
        undrained = []
        for batch, group, operation in receiver.in_flight:
            while not (stopped := group.has_stopped(operation)) and time.monotonic() < end:
                time.sleep(0.01)
            if not stopped:
                _undrained.append((group, operation))
                undrained += [(self._regions.address(one), one[2]) for one in batch.destinations]
        return undrained


def _parse_offer(offer: bytes, ours: Settings) -> tuple[str, int, Settings, bool]:
    """The token, the store's port, the settings for both sides, and whether both are on one host.

    Raises `ProtocolError`.
    """
    try:
        token, port, batch, bucket, small, stable, theirs, host = msgpack.unpackb(offer)
        sizes = [min(int(a), b) for a, b in ((batch, ours.batch), (bucket, ours.bucket), (small, ours.small))]
        mine = ours.ctas.min_ctas, ours.ctas.max_ctas, ours.ctas.cga_cluster_size
        ctas = [their if our is None else our for their, our in zip(theirs, mine, strict=True)]
    except Exception as error:  # msgpack has no common base for what it raises on bad bytes
        raise ProtocolError(f"the seed's offer cannot be read: {error}") from error
    if min(sizes) < 1 or type(port) is not int or not 0 < port < 65536 or type(stable) is not bool:
        raise ProtocolError("the seed's offer has values out of range")
    same_host = host == process.host_id()
    batch = sizes[0] if same_host else min(sizes[0], MAX_NETWORK_BATCH)
    settings = evolve(ours, batch=batch, bucket=sizes[1], small=sizes[2], ctas=CtaLimits(*ctas), stable=stable)
    return str(token), port, settings, same_host


def _close_all(groups: Sequence[PairGroup]) -> None:
    for group in groups:
        group.close()
