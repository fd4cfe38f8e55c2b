"""The seed's side of a lease: it waits for the fork's messages, and sends the batches that the fork asks for."""

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import msgpack
from attrs import evolve

from tensorfork.errors import PeerUnreachable, ProtocolError, TensorForkError, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.memory.host_reads import UnreadableMemory
from tensorfork.regions import Region
from tensorfork.sockets.address import WILDCARDS, local_address, numeric_host
from tensorfork.transports.base import Channel, Export, Site
from tensorfork.transports.process_group.backends import create_group, warm_up_thread
from tensorfork.transports.process_group.batches import ByteRange, decode_page
from tensorfork.transports.process_group.messages import MAX_PAIRS, MessageChannel
from tensorfork.transports.process_group.pair_group import SEED, CtaLimits, PairGroup, Settings
from tensorfork.transports.process_group.region_tensors import RegionTensors
from tensorfork.transports.process_group.rendezvous import GroupStores, serve_store
from tensorfork.transports.process_group.sender import BatchSender, check_lease
from tensorfork.transports.process_group.tasks import Watchdog, run_together

log = logging.getLogger("tensorfork")


class GroupExport(Export):
    """One lease of the seed's.

    Args:
        settings: the seed's; the offer has them.
        regions: the regions that are leased.
        site: where the seed listens.
        ports: the ports that the store may listen on, or None for any.
        rate_limit: bytes a second for this lease, or None. It also asks for its share of the site's.
        joining: seconds that creating groups may take.
        stall: seconds after which a batch that still waits for the fork is aborted.
        deadline: when the lease ends.
    """

    def __init__(
        self,
        settings: Settings,
        regions: Sequence[Region],
        site: Site,
        *,
        ports: range | None,
        rate_limit: float | None,
        joining: float,
        stall: float,
        deadline: float,
    ) -> None:
        self._regions = RegionTensors(regions)
        self._settings = evolve(settings, stable=self._regions.stable)
        self._site, self._deadline, self._joining, self._stall = site, deadline, joining, stall
        self._share = site.limiter.share(rate_limit)
        self._groups: list[PairGroup] = []
        self._pairs: list[tuple[str, str]] = []  # the devices of each group
        self._ended, self._serving = threading.Event(), threading.Lock()
        token = secrets.token_hex(16)
        self._server, host, port = serve_store(site.bind, ports, deadline)
        self._stores: GroupStores | None = GroupStores(host, port, token, deadline, self._check_lease)
        self._stores.announce()
        ctas = [settings.ctas.min_ctas, settings.ctas.max_ctas, settings.ctas.cga_cluster_size]
        sizes = [settings.batch, settings.bucket, settings.small]
        self.offer = msgpack.packb([token, port, *sizes, self._regions.stable, ctas, process.host_id()])

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`."""
        messages = MessageChannel(channel)
        with self._serving:
            try:
                while not self._ended.is_set():
                    self._handle(messages.recv(self._deadline, self._check_lease), messages)
            except (TensorForkError, RuntimeError) as error:
                if not self._ended.is_set():
                    self._fail(messages, error)
            finally:
                for group in self._groups:
                    group.close()

    def close(self, deadline: float) -> bool:
        """See `Export.close`."""
        self._ended.set()
        self._share.close()
        self._abort()
        served = self._serving.acquire(timeout=max(0.1, deadline - time.monotonic()))
        if served:
            self._server = self._stores = None
            self._serving.release()
        return served

    def _handle(self, message: Sequence[Any], channel: MessageChannel) -> None:
        match message:
            case ["join", list(pairs), [min_ctas, max_ctas, cga_cluster_size], str(address)]:
                limits = CtaLimits(_cta_limit(min_ctas), _cta_limit(max_ctas), _cta_limit(cga_cluster_size))
                self._join(pairs, limits, address, channel)
            case ["parcels", bool(last), bytes(page)]:
                self._send(last, page, channel)
            case _:
                raise ProtocolError(f"a message {message[0][:20]!r} came where none is expected")

    def _join(self, requested: Sequence[Any], ctas: CtaLimits, fork: str, channel: MessageChannel) -> None:
        """Create a group with the fork for each pair of devices requested. `fork` is the fork's address."""
        deadline = min(self._deadline, time.monotonic() + self._joining)
        pairs = [self._check_pair(pair) for pair in requested]
        if len(self._pairs) + len(pairs) > MAX_PAIRS:
            raise ProtocolError(f"more than {MAX_PAIRS} pairs of devices were asked for")
        bind = self._site.bind
        address = local_address(fork) if bind in WILDCARDS else numeric_host(bind)
        channel.send("ready", deadline=deadline)

        def check() -> None:
            self._check_lease()
            if time.monotonic() > deadline:
                raise TransportUnavailable("the groups were not created in time")

        assert self._stores is not None
        settings = evolve(self._settings, ctas=ctas)
        creations = [
            partial(create_group, pair, store, SEED, self._regions, settings, address, deadline)
            for pair, store in zip(pairs, self._stores.take(len(pairs), deadline, check), strict=True)
        ]
        for pair in pairs:
            warm_up_thread(pair, SEED, self._regions, settings)
        self._groups += run_together(creations, PairGroup.close, "tensorfork-group", check)
        self._pairs += pairs
        self._check_lease()
        channel.send("joined", deadline=deadline)

    def _check_pair(self, pair: Any) -> tuple[str, str]:
        """The seed's device and the fork's. Raises `ProtocolError` unless there are regions on the seed's device."""
        match pair:
            case [str(ours), str(theirs)] if ours in self._regions.devices and len(theirs) < 20:
                return ours, theirs
        raise ProtocolError(f"the seed has no memory on {str(pair)[:60]}")

    def _send(self, last: bool, page: bytes, channel: MessageChannel) -> None:
        """Serve one pull, whose first page of batches is given."""
        with Watchdog(self._deadline, "the lease has ended", None, self._abort) as watchdog:
            sender = BatchSender(channel, self._share, watchdog, self._ended, self._deadline, self._stall)
            sender.send(self._requested_batches(last, page, channel))

    def _requested_batches(
        self, last: bool, page: bytes, channel: MessageChannel
    ) -> Iterator[tuple[PairGroup, bool, Sequence[ByteRange]]]:
        """Yield the batches on this page and those that follow, each checked before it is yielded."""
        while True:
            for index, packed, ranges in decode_page(page):
                self._check_batch(index, packed, ranges)
                yield self._groups[index], packed, ranges
            if last:
                return
            match message := channel.recv(self._deadline, self._check_lease):
                case ["parcels", bool(last), bytes(page)]:
                    continue
            raise ProtocolError(f"a message {message[0][:20]!r} came where batches are expected")

    def _check_batch(self, index: int, packed: bool, ranges: Sequence[ByteRange]) -> None:
        """Raise `ProtocolError` unless the group exists, all ranges may be read, and they fit one batch."""
        if index >= len(self._groups):
            raise ProtocolError(f"there is no group {index}")
        device = self._pairs[index][SEED]
        for one in ranges:
            if not self._regions.may_read(one, device):
                raise ProtocolError("a range outside what the seed has published was asked for")
        limits = self._settings.limits(self._pairs[index])
        if sum(nbytes for _, _, nbytes in ranges) > (limits.bucket if packed else limits.batch):
            raise ProtocolError("a batch was asked for that is larger than a bucket, or than the offer allows")

    def _check_lease(self) -> None:
        check_lease(self._ended)

    def _abort(self) -> None:
        for group in list(self._groups):
            group.abort()

    def _fail(self, channel: MessageChannel, error: BaseException) -> None:
        """Tell the fork, if it is still there; then abort, which the fork would notice first, and raise
        `PeerUnreachable`: for the seed, the fork is gone.
        """
        reason = str(error)
        if isinstance(error, UnreadableMemory):
            log.warning("a fork asked for what was published, and cannot be read any more: %s", error)
            reason = (
                "it cannot read that memory any more: what it published was freed, moved or unmapped. Have it publish "
                "again"
            )
        try:
            channel.send("failed", reason[:4096], deadline=time.monotonic() + 1.0)
        except PeerUnreachable:
            pass
        self._abort()
        raise PeerUnreachable(f"the transfer ended: {error}") from error


def _cta_limit(value: Any) -> int | None:
    """One of NCCL's limits, as the fork asks for it. Raises `ProtocolError`."""
    if value is None or (type(value) is int and 0 < value <= 64):
        return value
    raise ProtocolError(f"{str(value)[:20]!r} is not a valid number of CTAs")
