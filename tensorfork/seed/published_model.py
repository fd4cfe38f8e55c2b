"""A model that is published and may change: what it is now, its generation and its version."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.lineage import Version
from tensorfork.model.describe import LocalModel, ModelSource
from tensorfork.model.modes import in_normal_mode
from tensorfork.seed.generation import Commit, SeqLock
from tensorfork.seed.publication import Publication
from tensorfork.transports.base import Transport


class PublishedModel:
    """What a seed publishes. Knows neither forks nor leases.

    Args:
        model: as it was described.
        source: of the same model as it is now; None where it cannot change.
        transports: to offer, by name.
        version: its first.
        stable: whether the owner promises that the tensors' memory stays where it is.
        on_replaced: called with the new publication when it takes the place of another one. Must be quick.
    """

    def __init__(
        self,
        model: LocalModel,
        source: ModelSource | None,
        transports: Mapping[str, Transport],
        version: Version,
        stable: bool,
        on_replaced: Callable[[Publication], None],
    ) -> None:
        self._source, self._transports, self._on_replaced = source, transports, on_replaced
        self.publication = Publication.of(0, model, transports, stable=stable, fixed=source is None)
        self.version = version
        self._next_version: tuple[str | None] | None = None
        """The label of the version that the change now under way makes; None if it makes none."""
        self._replaced: list[Publication] = []
        self._sleep_lock = threading.Lock()
        self.suspended = False
        self.seqlock = SeqLock(self._settle)

    @property
    def generation(self) -> int:
        """See `Seed.generation`."""
        return self.seqlock.generation

    def at_one_moment(self) -> tuple[int, Publication]:
        """The generation, and the publication that it belongs to; the generation is odd during a change."""
        generation, publication = self.seqlock.generation, self.publication
        if generation != self.seqlock.generation:
            generation |= 1
        return generation, publication

    @contextmanager
    def updating(self, values_only: bool, label: str | None) -> Iterator[None]:
        """See `Seed.updating`."""
        self._begin_update(values_only)
        try:
            yield
        except BaseException as error:
            self._end_update(label, error)
            raise
        self._end_update(label)

    @in_normal_mode
    def _begin_update(self, values_only: bool) -> None:
        self.seqlock.enter(values_only)

    @in_normal_mode
    def _end_update(self, label: str | None, error: BaseException | None = None) -> None:
        if error is not None:
            self.seqlock.leave(error)
            return
        try:
            _synchronize(self.publication.gpus)
            self._next_version = (label,)
        except BaseException as raised:
            self.seqlock.leave(raised)
            raise
        self.seqlock.leave()
        self.forget_replaced()

    @in_normal_mode
    def suspend(self) -> None:
        """Begin a change that lasts until `resume`. A second call does nothing."""
        with self._sleep_lock:
            if not self.suspended:
                self.suspended = True
                self.seqlock.enter()

    @in_normal_mode
    def resume(self) -> None:
        """End that change. Raises as `Seed.resume` does; then the generation stays odd."""
        with self._sleep_lock:
            if self.suspended:
                try:
                    self.seqlock.leave()
                finally:
                    self.suspended = False
        self.forget_replaced()

    def forget_replaced(self) -> None:
        """Have the transports forget what was replaced."""
        while self._replaced:
            self.forget(self._replaced.pop())

    def forget(self, publication: Publication | None = None) -> None:
        """Have the transports forget a publication, by default the one there is."""
        for transport in self._transports.values():
            transport.forget((publication or self.publication).regions)

    def why_changing(self) -> str:
        """Why the generation is odd, for a fork."""
        if (failed := self.seqlock.failed) is None:
            return "the seed's weights are being changed; try again"
        return (
            f"the last change of the seed's weights failed ({failed}); it refuses forks until a later one succeeds, in "
            "seed.updating() or seed.rescan()"
        )

    def _settle(self, values_only: bool) -> Commit:
        """What the model is after a change: what was published, or something else."""
        old = self.publication
        if values_only or self._source is None:
            old.places.check()
            new = old
        else:
            with gc_paused():
                new = old.renewed(self._source, self._transports)
            _synchronize(new.gpus - old.gpus)

        def commit() -> None:
            if self._next_version is not None:
                self.version = Version(self.version.lineage, self.version.counter + 1, *self._next_version)
                self._next_version = None
            self.publication = new
            if new.number != old.number:
                self._replaced.append(old)
                self._on_replaced(new)

        return commit


def _synchronize(devices: Sequence[torch.device] | set[torch.device]) -> None:
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
