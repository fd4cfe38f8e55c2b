"""The fork's side of a lease: it draws up the order, asks for it, and receives."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from threading import Event
from typing import Any

import msgpack
from attrs import evolve

from tensorfork.errors import PeerUnreachable, ProtocolError, TensorForkError, TransferFailed, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.regions import Copy, Region, RemoteRegion
from tensorfork.sockets.address import local_address
from tensorfork.transports.base import Channel, Session
from tensorfork.transports.process_group.batches import Batch, pages, schedule
from tensorfork.transports.process_group.making import make_group
from tensorfork.transports.process_group.messages import MessageChannel
from tensorfork.transports.process_group.pair_group import FORK, WINDOW, Ctas, PairGroup, Settings
from tensorfork.transports.process_group.region_tensors import RegionTensors, holds
from tensorfork.transports.process_group.rendezvous import Stores
from tensorfork.transports.process_group.tasks import BackgroundTask, Watchdog, run_together

LISTEN = 0.002
"""Seconds between two looks whether the seed has said something, while something is under way."""
ATTEND = 0.05
"""Seconds between two such looks that wait a moment: only those see that the seed is gone."""
NETWORK = 128 << 20
"""Bytes of a parcel between hosts, at most: the seed ends one that takes longer than `stall`, as if the fork had
stopped, and networks may be slow."""
AWAKE = 0.001
"""Seconds for which the last word is looked for again and again: to fall asleep and be woken takes a tenth of that."""
LATE = "not everything had arrived by the deadline"
ENDING = 2.0
"""Seconds that closing waits for a group that is just being made: it holds our memory, and is not to be interrupted."""
DRAINING = 2.0
"""Seconds for a GPU to stop writing after an abort."""
_undrained: list[tuple[PairGroup, Any]] = []
"""What a GPU may still be writing to; kept for ever, since nothing says when it stops."""


class GroupSession(Session):
    """One lease, as the fork sees it.

    Args:
        offer: the seed's.
        settings: our own; the smaller of both sides' sizes count.
        seed: the seed's address, resolved.
        joining: seconds that the making of a group may take.
    """

    def __init__(
        self,
        offer: bytes,
        settings: Settings,
        seed: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        joining: float,
        deadline: float,
    ) -> None:
        token, port, self._settings, same_host = _read_offer(offer, settings)
        self.fabric = "tcp" if not settings.nccl else "p2p" if same_host else "network"
        self._seed, self._joining = seed, joining
        self._remote = {region.id: region for region in remote}
        self._memory = RegionTensors(regions)
        self._ours = {region.id: region for region in regions}
        self._talk = MessageChannel(channel)
        self._lanes: list[PairGroup] = []
        self._pairs: list[tuple[str, str]] = []
        self._broken = False
        self._ended = Event()
        theirs, ours = {region.device for region in remote}, {region.device for region in regions}
        pairs = [(one, other) for one in theirs for other in ours]
        self._first = pairs if len(pairs) == 1 else []  # else the copies say which are needed
        until = min(deadline, time.monotonic() + joining)
        self._stores: Stores | None = Stores(seed, port, token, until, _patience(until))
        self._meeting: BackgroundTask[list[PairGroup]] | None = None
        if self._first:
            self._meeting = BackgroundTask(
                lambda: self._join(self._first, until, self._wanted), _close_all, "tensorfork-meet"
            )

    def ready(self, deadline: float) -> None:
        """See `Session.ready`: the two sides meet, and make a group if one will do, which takes NCCL half a second."""
        if self._meeting is None:
            return
        try:
            self._lanes = self._meeting.result(_patience(min(deadline, time.monotonic() + self._joining)))
        except BaseException:
            self.close(deadline)
            raise
        self._meeting, self._pairs = None, list(self._first)

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`."""
        if self._broken:
            raise TransferFailed("this connection failed before; open another session")
        if cancel.is_set() or time.monotonic() >= deadline:
            raise TransferFailed("the transfer was cancelled" if cancel.is_set() else "the deadline is past")
        self.ready(deadline)
        pairs = self._first or self._pairs_of(copies)
        self._broken = True  # until it is over
        window: deque[tuple[Batch, Any]] = deque()
        made: Sequence[PairGroup] = ()
        with Watchdog(deadline, LATE, cancel, self._abort) as watch:
            pull = _Pull(self._talk, watch, cancel, deadline, done)
            try:
                if missing := sorted(set(pairs) - set(self._pairs)):
                    watch.begin()
                    until = min(deadline, time.monotonic() + self._joining)
                    self._lanes += self._join(missing, until, pull.check)
                    self._pairs += missing
                lanes = {pair: i for i, pair in enumerate(self._pairs)}
                numbers = [0] * len(copies) if self._first else [lanes[pair] for pair in pairs]
                limits = {i: self._settings.limits(pair) for i, pair in enumerate(self._pairs)}
                pull.run(copies, self._checked(schedule(copies, numbers, limits)), made := self._lanes, window)
            except BaseException as error:
                undrained = self._drain(window, made)
                if error is pull.callers or not isinstance(error, RuntimeError | TensorForkError):
                    raise
                raise TransferFailed(f"{self._seed}: {pull.reason(error)}", undrained=undrained) from error
        self._broken = bool(watch.reason)  # it may have ended just when it was to be aborted

    def close(self, deadline: float) -> None:
        """See `Session.close`."""
        self._ended.set()
        if self._meeting is not None:
            self._meeting.give_up(ENDING)
        lanes, self._lanes, self._stores, self._meeting = self._lanes, [], None, None
        idle, self._broken = not self._broken, True  # the last pull was whole, or there was none
        for lane in lanes:
            lane.close(idle)

    def _wanted(self) -> None:
        if self._ended.is_set():
            raise TransferFailed("nobody waits for this any more")

    def _join(self, pairs: Sequence[tuple[str, str]], until: float, look: Callable[[], object]) -> list[PairGroup]:
        """Make lanes for these pairs of devices, all at once. Raises `TransportUnavailable`, and leaves nothing.

        Before a pull this runs on a thread of its own, beside which nobody uses the channel.
        """
        patience = _patience(until)
        ctas = self._settings.ctas
        lanes: list[PairGroup] = []

        def both() -> None:
            patience()
            look()

        stores = self._stores
        try:
            look()
            if stores is None:
                raise TransferFailed("this session is closed")
            own = local_address(self._seed)
            self._talk.say("join", pairs, [ctas.fewest, ctas.most, ctas.cluster], own, until=until)
            self._expect("ready", until, look)
            makers = [
                self._maker(*each, own, until) for each in zip(pairs, stores.take(len(pairs), until, both), strict=True)
            ]
            lanes = run_together(makers, PairGroup.close, "tensorfork-join", both)
            self._expect("joined", until, look)
            return lanes
        except BaseException as error:
            _close_all(lanes)
            if isinstance(error, RuntimeError | PeerUnreachable | TransferFailed):
                raise TransportUnavailable(f"a group with {self._seed} could not be made: {error}") from error
            raise

    def _maker(self, pair: tuple[str, str], store: Any, own: str, until: float) -> Callable[[], PairGroup]:
        return lambda: make_group(pair, store, FORK, self._memory, self._settings, own, until)

    def _expect(self, word: str, until: float, look: Callable[[], object]) -> None:
        words = self._talk.hear(until, look)
        if words[0] == "failed":
            raise TransferFailed(f"the seed says: {str(words[-1])[:4096]}")
        if words[0] != word:
            raise ProtocolError(f"the seed said {words[0][:20]!r} where {word!r} is expected")

    def _pairs_of(self, copies: Sequence[Copy]) -> list[tuple[str, str]]:
        """The two devices of each copy. Raises `TransferFailed` where there is no such region."""
        try:
            return [(self._remote[copy.region].device, self._ours[copy.into].device) for copy in copies]
        except KeyError as error:
            raise TransferFailed(f"a copy names the region {error}, and there is none of that number") from error

    def _checked(self, parcels: Iterable[Batch]) -> Iterator[Batch]:
        """The same. Raises `TransferFailed` at one that does not lie within the regions of both sides."""
        for parcel in parcels:
            theirs, ours = self._pairs[parcel.lane]
            if not all(holds(self._remote, stretch, theirs) for stretch in parcel.theirs):
                raise TransferFailed("a copy lies outside the seed's regions")
            if not all(self._memory.holds(stretch, ours) for stretch in parcel.ours):
                raise TransferFailed("a copy lies outside our regions")
            yield parcel

    def _abort(self) -> None:
        for lane in self._lanes:
            lane.abort()

    def _drain(self, window: Sequence[tuple[Batch, Any]], lanes: Sequence[PairGroup]) -> list[tuple[int, int]]:
        """Stop everything; the stretches, as (address, bytes), that may be written to all the same."""
        self._abort()
        end = time.monotonic() + DRAINING
        undrained = []
        for parcel, begun in window:
            lane = lanes[parcel.lane]
            while not (quiet := lane.quiet(begun)) and time.monotonic() < end:
                time.sleep(0.01)
            if not quiet:
                _undrained.append((lane, begun))
                undrained += [(self._memory.address(stretch), stretch[2]) for stretch in parcel.ours]
        return undrained


class _Pull:
    """One pull, under way. A parcel counts when it has arrived here, and the seed has said that it left whole: of an
    operation that the seed aborts, this side cannot tell that the bytes never came. `callers` is what `done` raised.
    """

    def __init__(
        self,
        talk: MessageChannel,
        watch: Watchdog,
        cancel: threading.Event,
        deadline: float,
        done: Callable[[int], None],
    ) -> None:
        self._talk, self._watch, self._cancel, self._deadline, self._done = talk, watch, cancel, deadline, done
        self._listen = time.monotonic()
        self._attend = self._listen + ATTEND
        self._parcels: list[Batch] = []  # asked for
        self._all = False
        self._left: list[int] = []  # bytes that each copy still needs
        self._arrived = self._sent = self._counted = 0  # parcels
        self._failed = ""
        self.callers: BaseException | None = None

    def run(
        self,
        copies: Sequence[Copy],
        parcels: Iterable[Batch],
        lanes: Sequence[PairGroup],
        window: deque[tuple[Batch, Any]],
    ) -> None:
        """Receive all parcels, which hold these copies. What is under way is in the window."""
        book = pages(parcels)
        self._ask(book)
        self._left = [copy.nbytes for copy in copies]
        for i in [i for i, nbytes in enumerate(self._left) if not nbytes]:
            self._say_done(i)
        for lane in lanes:
            lane.prepare()
        for number in count():
            wanted = number + (WINDOW if len(window) == WINDOW else 1)  # no more than is needed to keep the link busy
            while not self._all and len(self._parcels) < wanted:
                self._ask(book)
            if number == len(self._parcels):
                break
            if len(window) == WINDOW:
                self._finish(window, lanes)
            parcel = self._parcels[number]
            window.append((parcel, lanes[parcel.lane].begin(parcel.ours, parcel.packed, self._deadline)))
            self._watch.begin()
        while window:
            self._finish(window, lanes)
        self._count(len(self._parcels))
        awake = time.monotonic() + AWAKE
        while self._counted < len(self._parcels):
            if time.monotonic() < awake:
                words = self._talk.overhear(0.0)
            else:
                words = self._talk.hear(self._deadline, self.check)
            if words:
                self._note(words)
                self._count(len(self._parcels))

    def check(self) -> None:
        """Raise if it is over: cancelled, or late."""
        if self._cancel.is_set():
            raise TransferFailed("the transfer was cancelled")
        if self._watch.reason or time.monotonic() >= self._deadline:
            raise TransferFailed(self._watch.reason or LATE)

    def look(self) -> None:
        """Raise if it is over; hear what the seed says, without waiting for it; and see to a parcel that counts now.

        One at a time: what `done` does must not keep the next from being begun.
        """
        self.check()
        now = time.monotonic()
        if now >= self._listen:
            until = now
            if now >= self._attend:
                self._attend, until = now + ATTEND, now + 0.001
            while words := self._talk.overhear(until):
                self._note(words)
            self._listen = time.monotonic() + LISTEN
        self._count(1)

    def reason(self, error: BaseException) -> str:
        """Why it failed: what we did ourselves, what the seed says, or what torch saw."""
        if self._watch.reason or self._failed or not isinstance(error, RuntimeError):
            return self._watch.reason or self._failed or str(error)
        try:
            while words := self._talk.overhear(time.monotonic() + ATTEND):
                self._note(words)
        except (TransferFailed, ProtocolError, PeerUnreachable) as said:
            return f"{said} ({str(error).splitlines()[0]})"
        return f"the connection broke: {str(error).splitlines()[0]}"

    def _ask(self, book: Iterator[tuple[bytes, list[Batch]]]) -> None:
        """Ask for another page of parcels; an empty one says that there are no more."""
        page, parcels = next(book, (b"", []))
        self._all = not parcels
        self._talk.say("parcels", self._all, page, until=self._deadline)
        self._parcels += parcels

    def _finish(self, window: deque[tuple[Batch, Any]], lanes: Sequence[PairGroup]) -> None:
        parcel, begun = window[0]
        lanes[parcel.lane].finish(begun, self.look)
        window.popleft()
        self._arrived += 1
        self.look()  # `finish` has not, where it had nothing to wait for
        self._count(1)  # two for one, so as to catch up

    def _count(self, most: int) -> None:
        """Say `done` for copies that are whole now, by the next parcels that count, so many at most."""
        for parcel in self._parcels[self._counted : min(self._counted + most, self._arrived, self._sent)]:
            self._counted += 1
            for i, (_, _, nbytes) in zip(parcel.copies, parcel.ours, strict=True):
                self._left[i] -= nbytes
                if not self._left[i]:
                    self._say_done(i)

    def _say_done(self, i: int) -> None:
        try:
            self._done(i)
        except BaseException as error:
            self.callers = error
            raise
        if self._cancel.is_set():
            raise TransferFailed("the transfer was cancelled")

    def _note(self, words: Sequence[Any]) -> None:
        match words:
            case ["sent", int(count)] if self._sent < count <= len(self._parcels):
                self._sent = count
            case ["failed", str(reason)]:
                self._failed = f"the seed says: {reason}"
                raise TransferFailed(self._failed)
            case _:
                raise ProtocolError(f"the seed said {str(words)[:40]} where nothing of the kind is expected")


def _read_offer(offer: bytes, ours: Settings) -> tuple[str, int, Settings, bool]:
    """The token, the store's port, what both sides keep to, and whether they share a host."""
    try:
        token, port, parcel, bucket, small, ctas, host = msgpack.unpackb(offer)
        sizes = [min(int(a), b) for a, b in ((parcel, ours.parcel), (bucket, ours.bucket), (small, ours.small))]
        limits = [theirs if mine is None else mine for theirs, mine in zip(ctas, _ctas(ours.ctas), strict=True)]
    except Exception as error:  # msgpack has no common base for what it raises on bad bytes
        raise ProtocolError(f"the seed's offer cannot be read: {error}") from error
    if min(sizes) < 1 or type(port) is not int or not 0 < port < 65536:
        raise ProtocolError("the seed's offer is no offer")
    same_host = host == process.host_id()
    parcel = sizes[0] if same_host else min(sizes[0], NETWORK)
    settings = evolve(ours, parcel=parcel, bucket=sizes[1], small=sizes[2], ctas=Ctas(*limits))
    return str(token), port, settings, same_host


def _close_all(lanes: Sequence[PairGroup]) -> None:
    for lane in lanes:
        lane.close()


def _ctas(ctas: Ctas) -> list[int | None]:
    return [ctas.fewest, ctas.most, ctas.cluster]


def _patience(until: float) -> Callable[[], None]:
    def look() -> None:
        if time.monotonic() >= until:
            raise TransportUnavailable(
                "the two sides did not find one another in time; check that the seed's ports can be reached"
            )

    return look
