"""The object that `publish` returns."""

import os
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from tensorfork.digest.record import Digests
from tensorfork.interpreter import ending
from tensorfork.layout import ModelLayout
from tensorfork.lineage import Version, check_label
from tensorfork.model.describe import LocalModel, ModelSource
from tensorfork.seed.address import Advertised
from tensorfork.seed.leases import SeedStats
from tensorfork.seed.limits import Limits
from tensorfork.seed.service import CLOSE_TIMEOUT, SeedService
from tensorfork.sockets.address import Address
from tensorfork.transports.base import Transport
from tensorfork.validators import seconds


class Seed:
    """A published model. Made by `tensorfork.publish`; keeps the model and its tensors alive until `close`.

    Attributes:
        address: where forks find it, such as ``tcp://10.0.0.7:4180``.
        identity: which model it is; None unless `publish` was told.
        rank: which part of the model it is; None unless `publish` was told.
    """

    def __init__(
        self,
        model: LocalModel,
        source: ModelSource | None,
        transports: Mapping[str, Transport],
        version: Version,
        stable: bool,
        bound: Address,
        advertised: Advertised,
        limits: Limits,
    ) -> None:
        self._closed = True  # so that `__del__` does nothing if the next line raises
        self._service = SeedService(model, source, transports, version, stable, bound, advertised, limits)
        self._closed = False
        self._is_snapshot = source is None
        _open.add(self)
        if ending.begun():  # nobody would close it
            self.close()
            ending.check()
        self.address = str(self._service.address)
        self.identity, self.rank = model.layout.identity, model.layout.rank

    @property
    def layout(self) -> ModelLayout:
        """The tensors and storages that are published now."""
        return self._service.model.publication.layout

    @property
    def generation(self) -> int:
        """A number that changes with every change of the tensors; odd while they are being changed."""
        return self._service.model.generation

    @property
    def version(self) -> Version:
        """Which weights it holds. `content` is there once digests have been computed for them."""
        return self._service.version

    def updating(self, *, values_only: bool = False, version: str | None = None) -> AbstractContextManager[None]:
        """A context manager around a change of the model, so that no fork takes a mixture of old and new.

        Inside, tensors may be written, replaced, added, freed and moved. On leaving it, the current stream of each of
        the model's GPUs is synchronised, and the model is walked again, in some 10 ms for 300 tensors: what it is now
        is published. If anything but values has changed, leases on what was published before end, and the seed refers
        to that memory no longer. Then the generation becomes even again. Changes from several threads may overlap.

        Args:
            values_only: promise that the same tensors stay in the same memory. Then the model is not walked; that the
                memory is the same is checked all the same.
            version: a label for the version that this change makes, such as ``step-1200``.

        Raises:
            UnsupportedTensor: the model has a tensor now that cannot be published, such as one that was freed.
            SeedMoved: with `values_only`, tensors are not where they were.
            RuntimeError: the seed publishes a snapshot, which does not change.

        If the change raises, or leaving it does, the generation stays odd, and forks are refused, until a later change
        succeeds.
        """
        check_label(version)
        if self._is_snapshot:
            raise RuntimeError("a snapshot does not change; close this seed, and publish the model again")
        return self._service.model.updating(values_only, version)

    def rescan(self) -> None:
        """Publish the model as it is now: what leaving `updating` does, with its errors."""
        with self.updating():
            pass

    def suspend(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Let nobody touch the model's memory until `resume`, so that it may be unmapped.

        No lease is granted, those that run are ended, and so is the computation of digests. When this returns, nothing
        of tensorfork reads the memory any more, here or in a fork; but a fork that had it open over CUDA IPC or NVLink
        may keep it from being freed until its process closes it (docs/reliability.md). A second call waits again.

        Args:
            timeout: seconds to wait for forks and threads; a day at most.

        Raises:
            MemoryInUse: somebody can still read the memory; it says who. The seed stays suspended.
        """
        self._service.suspend(time.monotonic() + seconds("timeout", timeout, zero=True))

    def resume(self) -> None:
        """End `suspend`, once the memory is mapped again, and `drain`: forks are served again.

        The model is walked again, as on leaving `updating`, and with its errors, after which forks are refused until a
        later change succeeds. The version stays; load other weights under `updating`, which may lie in between.
        """
        self._service.resume()

    def drain(self, timeout: float) -> bool:
        """Grant no lease from now on, until `resume`, and wait until those that run have ended by themselves.

        Returns whether they have, within `timeout` seconds, a day at most. They go on in any case, until `close`.
        """
        return self._service.drain(time.monotonic() + seconds("timeout", timeout, zero=True))

    def digests(self) -> Digests:
        """The digest of every tensor that is published, at the current generation, with the content's and the version.

        They are computed once a generation, when first asked for by anybody, on a thread and on streams of their own,
        with a quarter of a GPU's multiprocessors. The caller waits for them; the streams that the model computes on do
        not. What was changed in place outside of `updating` is not seen once they are there:
        `tensorfork.digests(model)` computes anew.

        Raises:
            SeedChanged: the weights are being changed, or changed before the digests were there.
            SeedMoved: the tensors are not where they were published.
            SeedAsleep: the seed is suspended.
            PeerRefused: they could not be computed; the message says why.
            ResourceExhausted: this process has no thread left for them.
            RuntimeError: the seed is closed.
        """
        return self._service.digests()

    def stats(self) -> SeedStats:
        """What it has done so far."""
        return self._service.stats()

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Stop answering and end all leases, waiting at most `timeout` seconds. Forks in progress fail.

        A second call does nothing.
        """
        deadline = time.monotonic() + seconds("timeout", timeout, zero=True)
        if not self._closed:
            self._closed = True
            _open.discard(self)
            self._service.close(deadline)

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


def _close_all(deadline: float) -> None:
    for seed in list(_open):
        seed.close(max(0.0, deadline - time.monotonic()))


ending.at_exit(_close_all)
