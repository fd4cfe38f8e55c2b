"""The seed's side of a lease: it waits for the fork's words, and sends the parcels that the fork asks for."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgpack
from attrs import evolve

from tensorfork.errors import PeerUnreachable, ProtocolError, TensorForkError, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.regions import Region
from tensorfork.sockets.address import WILDCARDS, local_address, numeric_host
from tensorfork.transports.base import Channel, Export, Site
from tensorfork.transports.process_group.batches import Stretch, read_page
from tensorfork.transports.process_group.making import make_group, warm_up_thread
from tensorfork.transports.process_group.messages import MAX_PAIRS, MessageChannel
from tensorfork.transports.process_group.pair_group import SEED, WINDOW, Ctas, PairGroup, Settings
from tensorfork.transports.process_group.region_tensors import RegionTensors
from tensorfork.transports.process_group.rendezvous import Stores, serve_store
from tensorfork.transports.process_group.tasks import Watchdog, run_together
from tensorfork.transports.rate_limit import RateLimiter

CATCH_UP = 0.01
"""Seconds lost by waking late that a rate limit makes up for."""
TELL = 0.004
"""Seconds from one word to the fork that parcels have left to the next, in the mean: each costs the seed's interpreter
some 0.1 ms."""


class GroupExport(Export):
    """One lease of the seed's.

    Args:
        settings: what the fork is told of how to ask.
        regions: the memory.
        site: where to listen.
        ports: the range in which to, or None.
        rate_limit: bytes a second, or None.
        joining: seconds that the making of a group may take.
        stall: seconds after which a GPU's kernel that waits for the fork is ended.
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
        self._settings, self._memory = settings, RegionTensors(regions)
        self._site, self._deadline, self._joining, self._stall = site, deadline, joining, stall
        self._token = secrets.token_hex(16)
        self._limiter = RateLimiter(rate_limit, catch_up=CATCH_UP)
        self._lanes: list[PairGroup] = []
        self._pairs: list[tuple[str, str]] = []
        self._ended, self._serving = threading.Event(), threading.Lock()
        self._server, own, port = serve_store(site.bind, ports, deadline)
        self._stores: Stores | None = Stores(own, port, self._token, deadline, self._look)
        ctas = [settings.ctas.fewest, settings.ctas.most, settings.ctas.cluster]
        self.offer = msgpack.packb(
            [self._token, port, settings.parcel, settings.bucket, settings.small, ctas, process.host_id()]
        )

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`."""
        talk = MessageChannel(channel)
        with self._serving:
            try:
                while not self._ended.is_set():
                    self._answer(talk.hear(self._deadline, self._look), talk)
            except (TensorForkError, RuntimeError) as error:
                if not self._ended.is_set():
                    self._abort()
                    self._fail(talk, error)
            finally:
                for lane in self._lanes:
                    lane.close()

    def close(self, deadline: float) -> bool:
        """See `Export.close`."""
        self._ended.set()
        self._abort()
        served = self._serving.acquire(timeout=max(0.1, deadline - time.monotonic()))
        if served:
            self._server = self._stores = None
            self._serving.release()
        return served

    def _answer(self, words: Sequence[Any], talk: MessageChannel) -> None:
        match words:
            case ["join", list(pairs), [fewest, most, cluster], str(address)]:
                self._join(pairs, Ctas(_few(fewest), _few(most), _few(cluster)), address, talk)
            case ["parcels", bool(last), bytes(page)]:
                self._send(last, page, talk)
            case _:
                raise ProtocolError(f"a message {words[0][:20]!r} came where none is expected")

    def _join(self, pairs: Sequence[Any], ctas: Ctas, address: str, talk: MessageChannel) -> None:
        until = min(self._deadline, time.monotonic() + self._joining)
        wanted = [self._pair(pair) for pair in pairs]
        if len(self._pairs) + len(wanted) > MAX_PAIRS:
            raise ProtocolError(f"more than {MAX_PAIRS} pairs of devices were asked for")
        bind = self._site.bind
        own = local_address(address) if bind in WILDCARDS else numeric_host(bind)
        talk.say("ready", until=until)
        settings = evolve(self._settings, ctas=ctas)

        def look() -> None:
            self._look()
            if time.monotonic() > until:
                raise TransportUnavailable("the group was not made in time")

        def maker(pair: tuple[str, str], store: Any) -> Callable[[], PairGroup]:
            return lambda: make_group(pair, store, SEED, self._memory, settings, own, until)

        assert self._stores is not None
        makers = [maker(*each) for each in zip(wanted, self._stores.take(len(wanted), until, look), strict=True)]
        for pair in wanted:
            warm_up_thread(pair, SEED, self._memory, settings)
        self._lanes += run_together(makers, PairGroup.close, "tensorfork-join", look)
        self._pairs += wanted
        self._look()
        talk.say("joined", until=until)

    def _pair(self, pair: Any) -> tuple[str, str]:
        match pair:
            case [str(theirs), str(forks)] if theirs in self._memory.devices and len(forks) < 20:
                return theirs, forks
        raise ProtocolError(f"the seed has no memory on {str(pair)[:60]}")

    def _send(self, last: bool, page: bytes, talk: MessageChannel) -> None:
        """Serve one pull, from its first page of parcels to the word that all have left."""
        window: deque[tuple[PairGroup, Any]] = deque()
        left = told = 0
        reports = RateLimiter(1 / TELL, catch_up=CATCH_UP)
        with Watchdog(self._deadline, "the lease has ended", None, self._abort) as watch:

            def go_on() -> None:
                self._look()
                watch.until = min(self._deadline, time.monotonic() + self._stall)

            def finish() -> None:
                nonlocal left, told
                go_on()
                lane, begun = window.popleft()
                lane.finish(begun, self._look)
                left += 1
                if reports.try_spend(1) <= 0:
                    talk.say("sent", left, until=self._deadline)
                    told = left

            for lane, packed, stretches in self._asked(last, page, talk):
                while (early := self._limiter.try_spend(sum(nbytes for _, _, nbytes in stretches))) > 0:
                    if window:  # there is time to see it off, and to say so
                        finish()
                    else:
                        self._ended.wait(min(early, 0.5))
                        go_on()
                if len(window) == WINDOW:
                    finish()
                window.append((lane, lane.begin(stretches, packed, self._deadline)))
                watch.begin()
                go_on()
            while window:
                finish()
            if told < left:
                talk.say("sent", left, until=self._deadline)

    def _asked(
        self, last: bool, page: bytes, talk: MessageChannel
    ) -> Iterator[tuple[PairGroup, bool, Sequence[Stretch]]]:
        """The parcels of this page and those that follow, each looked at before anything is done for it."""
        while True:
            for number, packed, stretches in read_page(page):
                yield self._checked(number, packed, stretches), packed, stretches
            if last:
                return
            match words := talk.hear(self._deadline, self._look):
                case ["parcels", bool(last), bytes(page)]:
                    continue
            raise ProtocolError(f"a message {words[0][:20]!r} came where parcels are expected")

    def _checked(self, number: int, packed: bool, stretches: Sequence[Stretch]) -> PairGroup:
        """The lane, if everything asked for lies in the regions and fits into a bucket. Raises `ProtocolError`."""
        if number >= len(self._lanes):
            raise ProtocolError(f"there is no lane {number}")
        device = self._pairs[number][SEED]
        for stretch in stretches:
            if not self._memory.holds(stretch, device):
                raise ProtocolError("a stretch outside the leased regions was asked for")
        if packed and sum(nbytes for _, _, nbytes in stretches) > self._settings.bucket:
            raise ProtocolError("more was asked for than a bucket holds")
        return self._lanes[number]

    def _look(self) -> None:
        if self._ended.is_set():
            raise PeerUnreachable("the lease has ended")

    def _abort(self) -> None:
        for lane in list(self._lanes):
            lane.abort()

    def _fail(self, talk: MessageChannel, error: BaseException) -> None:
        """Tell the fork, if it is still there; to the seed, whatever happened means that the fork is gone."""
        try:
            talk.say("failed", str(error)[:4096], until=time.monotonic() + 1.0)
        except PeerUnreachable:
            pass
        raise PeerUnreachable(f"the transfer ended: {error}") from error


def _few(value: Any) -> int | None:
    if value is None or (type(value) is int and 0 < value <= 64):
        return value
    raise ProtocolError(f"{str(value)[:20]!r} is no number of CTAs")
