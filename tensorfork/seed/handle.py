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
    """A published model. Made by `tensorfork.publish`; keeps the published tensors alive until `close`.

    Attributes:
        address: where forks find it, such as ``tcp://10.0.0.7:4180``.
        layout: the tensors and storages that it published.
        identity: which model it is; None unless `publish` was told.
        rank: which part of the model it is; None unless `publish` was told.
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
        self._closed = True  # so that `__del__` does nothing if the next line raises
        self._service = SeedService(layout, tensors, memory, transports, bind, advertise)
        self._closed = False
        _open.add(self)
        _close_at_exit()
        self.address = str(self._service.address)
        self.layout = layout
        self.identity, self.rank = layout.identity, layout.rank

    @property
    def generation(self) -> int:
        """A number that changes with every in-place change of the tensors; odd while they are being changed."""
        return self._service.seqlock.generation

    def updating(self) -> AbstractContextManager[None]:
        """A context manager around an in-place change of the tensors, so that no fork takes a mixture of old and new.

        On leaving it, the current stream of each of the model's GPUs is synchronised, and then the generation becomes
        even again. If the change raises, the generation stays odd, and forks are refused, until a later change
        succeeds. Changes from several threads may overlap.
        """
        return self._service.seqlock.updating()

    def stats(self) -> SeedStats:
        """What it has done so far."""
        return self._service.stats()

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Stop answering and end all leases, waiting at most `timeout` seconds. Forks in progress fail.

        A second call does nothing.
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

os.register_at_fork(after_in_child=_open.clear)  # the parent closes its own seeds


@cache
def _close_at_exit() -> None:
    """Have all seeds closed when the process exits, since a thread that is inside torch while Python ends aborts it.

    Registered once, and after the transports have registered their own exit functions, so that it runs before those.
    """
    atexit.register(_close_all)


def _close_all() -> None:
    for seed in list(_open):
        seed.close()
