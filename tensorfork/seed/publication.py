"""What a seed has published at one time. It never changes: a model whose tensors were replaced is published anew."""

import threading
from collections.abc import Mapping, Sequence
from operator import is_
from typing import NamedTuple

import torch
from attrs import evolve, field, frozen

from tensorfork.errors import TransportUnavailable, UnsupportedTensor
from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.layout import ModelLayout
from tensorfork.model.describe import LocalModel, ModelSource, check_mapped
from tensorfork.model.emptied import warn_if_emptied
from tensorfork.model.walk import FoundTensors
from tensorfork.regions import Region, RemoteRegion
from tensorfork.seed.look import PublishedPlaces
from tensorfork.seed.values import PublishedValues
from tensorfork.transports.base import Transport
from tensorfork.wire import messages, tables


class Covered(NamedTuple):
    """The regions that `Transport.cover` returns, and the pages that tell forks of them and of the places in them."""

    regions: Sequence[Region]
    region_pages: list[bytes]
    place_pages: list[bytes]


@frozen(eq=False, repr=False)
class Publication:
    """A model as it was published.

    Attributes:
        number: counts what the seed has published in turn. Two of one number are the same tensors in the same memory.
        layout: what forks are told.
        tensors: by name, in the layout's order.
        regions: their memory.
        places: where they lie; see `PublishedPlaces`.
        pages: the layout, packed.
        offered: the transports, each with its facts or why it cannot work.
        stable: whether the owner promises that the memory stays mapped.
        values: the plain values beside the tensors.
    """

    number: int
    layout: ModelLayout
    tensors: Mapping[str, torch.Tensor]
    regions: Sequence[Region]
    places: PublishedPlaces
    pages: tuple[messages.Pages, list[bytes]]
    offered: Mapping[str, messages.Offered]
    stable: bool
    values: PublishedValues
    _covered: dict[str, Covered] = field(factory=dict)
    _lock: threading.Lock = field(factory=threading.Lock)

    @classmethod
    def of(
        cls,
        number: int,
        model: LocalModel,
        transports: Mapping[str, Transport],
        *,
        stable: bool,
        fixed: bool = False,
    ) -> "Publication":
        """Publish a described model: ask each transport, pack the layout. `fixed` is whether its values stay.

        A warning is logged where much of the model is empty.

        Raises:
            UnsupportedTensor: tensors have no memory.
            ValueError: there are more of them than a fork can be told.
        """
        check_publishable(model)
        warn_if_emptied(model.tensors)
        regions = model.memory.regions(model.layout, stable=stable)
        return cls(
            number,
            model.layout,
            model.tensors,
            regions,
            PublishedPlaces(model, regions),
            tables.pack_layout(model.layout),
            {name: _offer(transport, regions) for name, transport in transports.items()},
            stable,
            PublishedValues(model.visited, fixed=fixed),
        )

    def renewed(self, source: ModelSource, transports: Mapping[str, Transport]) -> "Publication":
        """The model as it is now: this publication where only values have changed, or one with the next number.

        Raises as `of` does.
        """
        found = source.walk()
        if self._has(found) and self.places.same_forms() and not self.places.moved():
            places = self.places.with_holders(found.holders)
            return evolve(self, places=places, values=PublishedValues(found.visited, fixed=False))
        return Publication.of(self.number + 1, source.describe(found), transports, stable=self.stable)

    def _has(self, found: FoundTensors) -> bool:
        """Whether what was found are the same tensors under the same names."""
        placements = {one.name: one.placement for one in self.layout.tensors if one.placement is not None}
        return (
            list(found.tensors) == list(self.tensors)
            and all(map(is_, found.tensors.values(), self.tensors.values()))
            and found.placements == placements
            and found.left_out == self.layout.left_out
        )

    @property
    def gpus(self) -> set[torch.device]:
        """The GPUs that the tensors are on."""
        return {torch.device(one.device) for one in self.layout.storages if one.device.startswith("cuda")}

    def cover(self, transport: Transport) -> Covered:
        """What a transport covers, packed: equal for all leases."""
        with self._lock:
            if transport.name not in self._covered:
                with gc_paused():  # a full collection would stop the engine for as long as it takes
                    regions, places = transport.cover(self.regions)
                    remote = [RemoteRegion(region.id, region.nbytes, region.device) for region in regions]
                    by_storage = {region.id: place for region, place in zip(self.regions, places, strict=True)}
                    region_pages, place_pages = tables.pack_regions(remote), tables.pack_places(by_storage)
                    self._covered[transport.name] = Covered(regions, region_pages, place_pages)
                    del remote, places, by_storage
            return self._covered[transport.name]


def check_publishable(model: LocalModel) -> None:
    """Raise `UnsupportedTensor` for a tensor that has no memory: on the meta device, or not mapped on its GPU."""
    if meta := [name for name, tensor in model.tensors.items() if tensor.is_meta]:
        raise UnsupportedTensor(f"{meta[0]} is on the meta device and has no bytes to fork; load the model first")
    check_mapped(model)


def _offer(transport: Transport, regions: Sequence[Region]) -> messages.Offered:
    try:
        return messages.Offered(dict(transport.facts(regions)), None)
    except TransportUnavailable as error:
        return messages.Offered({}, str(error))
