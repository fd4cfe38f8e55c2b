"""The object that `publish` returns."""

import atexit
import os
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from types import TracebackType
from typing import Self

import torch

from tensorfork.layout import ModelLayout
from tensorfork.model.describe import ModelMemory
from tensorfork.seed.leases import SeedStats
from tensorfork.seed.service import CLOSE_TIMEOUT, SeedService
from tensorfork.transports.base import Transport


class Seed:
    """A published model. Made by `tensorfork.publish`; keeps what it published alive until `close`.

    Attributes:
        address: where forks find it, such as ``tcp://10.0.0.7:4180``.
        layout: what it published.
        identity: which model it is, where that was said.
        rank: which part of it, where that was said.
    """

    def __init__(
        self,
        layout: ModelLayout,
        tensors: Mapping[str, torch.Tensor],
        memory: ModelMemory,
        transports: Mapping[str, Transport],
        bind: str,
        advertise: str | None,
    ) -> None:
        self._closed = True  # until there is something to close
        self._service = SeedService(layout, tensors, memory, transports, bind, advertise)
        self._closed = False
        _open.add(self)
        _close_at_exit()
        self.address = str(self._service.address)
        self.layout = layout
        self.identity, self.rank = layout.identity, layout.rank

    @property
    def generation(self) -> int:
        """Changes when the tensors are changed in place; odd while they are being changed."""
        return self._service.clock.generation

    def updating(self) -> AbstractContextManager[None]:
        """A context manager round an in-place change of the tensors, so that no fork takes a mixture of old and new.

        Leaving it waits for the current stream of each of the model's GPUs before the generation is even again. Should
        the change raise, the generation stays odd, and forks are refused, until a later change succeeds. Changes from
        several threads may overlap.
        """
        return self._service.clock.updating()

    def stats(self) -> SeedStats:
        """What it has done so far."""
        return self._service.stats()

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Stop answering and end all leases, waiting at most `timeout` seconds. Forks under way fail; a second time
        does nothing.
        """
        if not self._closed:
            self._closed = True
            _open.discard(self)
            self._service.close(time.monotonic() + timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"generation {self.generation}"
        return f"<Seed {self.address} {len(self.layout.tensors):,} tensors, {state}>"


_open: "weakref.WeakSet[Seed]" = weakref.WeakSet()

os.register_at_fork(after_in_child=_open.clear)  # they are the parent's


@cache
def _close_at_exit() -> None:
    """Once, and behind what its transports have registered for the end, which comes after this, then. A thread that is
    inside of torch when Python has ended aborts the process.
    """
    atexit.register(_close_all)


def _close_all() -> None:
    for seed in list(_open):
        seed.close()
