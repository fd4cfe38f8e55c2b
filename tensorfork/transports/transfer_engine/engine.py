"""Mooncake's engine: the only module that calls it, and that knows what its numbers mean.

There is one engine for each process, fabric, host name and choice of NICs, made when it is first needed and kept for
the life of the process: its destructor holds the GIL for up to a second, and an engine without registrations is two
listening ports and two idle threads. None is used over `os.fork()`, and none after a call of it has hung.

Mooncake never raises. It aborts the process when Python ends while a thread is inside a call, so every call goes
through a gate that is shut at exit. It segfaults when asked for the outcome of a read whose outcome it has told.
"""

import atexit
import ctypes
import enum
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from attrs import frozen

from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.interpreter.environment import environment
from tensorfork.memory import allocations, cuda
from tensorfork.regions import Region
from tensorfork.transports.transfer_engine import library
from tensorfork.transports.transfer_engine.peer_lock import PeerLock
from tensorfork.transports.transfer_engine.registrations import Registrations

log = logging.getLogger("tensorfork")

FABRICS = ("nvlink", "rdma", "tcp")
EXIT = 2.0
"""Seconds that Python's exit waits for calls to return."""

_LANES = "MC_TCP_LANES_PER_PEER", "16"
"""After a failure, each of a peer's connections is idle for a second, and then takes on the next read in its queue: so
with as many connections as reads in the window, about, what has failed is over soon."""
_CODES = {
    -1: "refused, without a reason",
    -2: "too many requests",
    -3: "the memory is not registered",
    -6: "no such device",
    -7: "the memory is registered already, in part or whole",
    -101: "the host's name cannot be looked up",
    -102: "no connection",
    -104: "the peer refused the handshake",
    -200: "the peer's description cannot be had",
    -202: "the device cannot be used",
    -302: "out of memory",
}


class Outcome(enum.Enum):
    """What became of a read."""

    RUNNING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@frozen
class RemoteEngine:
    """Another engine: how it is addressed, and which descriptions of it are told apart."""

    host: str
    port: int
    nonce: bytes
    serial: bytes


class _Gate:
    """Counts the threads inside Mooncake, and lets none in once Python is about to end."""

    def __init__(self) -> None:
        self._inside, self._shut = 0, False
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        with self._changed:
            if self._shut:
                raise TransferFailed("the process is ending")
            self._inside += 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._inside -= 1
            if self._shut:
                self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in any more, and wait a little until all are out."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: not self._inside, EXIT)


class Engine:
    """One engine. Its methods are for any thread; what they do to memory is the caller's to bound.

    Attributes:
        fabric: nvlink, rdma or tcp.
        host: the name by which peers reach it.
        port: where it listens for them.
        nonce: tells it from any other engine that is or was at the same address.
        spans: what is registered with it.
        broken: a call hung; whoever comes next gets another engine.
    """

    def __init__(self, fabric: str, host: str, nics: Sequence[str]) -> None:
        module = library.load()
        if fabric == "nvlink" and not getattr(module, "SUPPORT_INTRA_NVLINK", True):
            raise TransportUnavailable(f"{library.wheel()} was built without NVLink within a host; use another fabric")
        if ":" in host and "MC_USE_IPV6" not in os.environ:
            raise TransportUnavailable(f"{host}: for IPv6, set MC_USE_IPV6=1 in the environment of both processes")
        self.fabric, self.host = fabric, host
        self.nonce, self.broken = secrets.token_bytes(8), False
        self._forks, self._turn = _forks, PeerLock()
        self._seen: dict[tuple[str, int], dict[bytes, int]] = {}
        self._known: set[str] = set()
        lanes = {_LANES[0]: os.environ.get(*_LANES)}
        with _gate, environment(library.ENVIRONMENT[fabric], lanes):
            self._mooncake: Any = module.TransferEngine()
            protocol = "rdma" if fabric == "rdma" else "tcp"  # what nvlink is reached by: the environment decides
            code = self._mooncake.initialize(host, "P2PHANDSHAKE", protocol, ",".join(nics))
            if code:
                raise TransportUnavailable(
                    f"Mooncake cannot start on {fabric} at {host} ({explain(code)}); MC_LOG_LEVEL=INFO in the "
                    "environment shows why. Check the NICs, and that MC_MIN_RPC_PORT to MC_MAX_RPC_PORT has free ports"
                )
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._mooncake))  # it is never destroyed: see above
            self.port = int(self._mooncake.get_rpc_port())
        self.spans = Registrations(self._register, self._unregister, self._identify)

    def address(self, peer: RemoteEngine) -> str:
        """The name to give to `read`.

        An engine keeps the first description it gets under a name, registrations and all. So a peer with other memory
        is given another name, with zeros before the port, which are the same to whoever connects.
        """
        if peer.nonce == self.nonce:
            return self._join(self.host, str(self.port))
        with _lock:
            seen = self._seen.setdefault((peer.host, peer.port), {})
            zeros = seen.setdefault(peer.nonce + peer.serial, len(seen))
        return self._join(peer.host, "0" * zeros + str(peer.port))

    def meet(self, work: Callable[[Callable[[], None]], Any]) -> "Handshake":
        """Do `work`, which reads from a peer for the first time, on another thread. It is given what to call when it
        has met the peer, if it does more than that.

        Mooncake asks for the peer's description inside that first read, and waits 60 s for one that is stopped.
        """
        return Handshake(self, work)

    def knows(self, address: str) -> bool:
        """Whether it has read from there before: handles over nvlink, once opened, stay so."""
        return address in self._known

    def read(self, address: str, into: int, source: int, nbytes: int, device: str, deadline: float) -> int:
        """Begin to read; a number for `outcome`, which must be asked until it is over. Raises `TransferFailed`."""
        self._check_process()
        with self._turn.take(deadline, alone=True), _gate, _on(device):
            number = int(self._mooncake.batch_transfer_async_read(address, [into], [source], [nbytes]))
        if not number:
            raise TransferFailed(
                f"Mooncake refused to read from {address}: nobody answers there, or the memory is not registered there"
            )
        return number

    def read_all(
        self,
        address: str,
        stretches: Sequence[tuple[int, int, int]],
        device: str,
        deadline: float,
        enough: threading.Event | None = None,
    ) -> None:
        """Read stretches (into, source, bytes) into one device, and wait for them; unless there is enough before they
        are begun.

        Raises `TransferFailed`; nothing is written any more, then.
        """
        self._check_process()
        into, sources, sizes = (list(column) for column in zip(*stretches, strict=True))
        with self._turn.take(deadline, alone=address not in self._known, enough=enough), _gate, _on(device):
            code = self._mooncake.batch_transfer_sync_read(address, into, sources, sizes)
        if code:
            self.settle([device])
            raise TransferFailed(
                f"Mooncake failed to read from {address} ({explain(code)}): its process died, or the memory is not "
                "registered there any more"
            )
        self._known.add(address)

    def outcome(self, number: int) -> Outcome:
        """What became of a read. Once it is over, it must not be asked again."""
        self._check_process()
        with _gate:
            code = self._mooncake.transfer_check_status(number)
        if code == 1:
            return Outcome.DONE
        return Outcome.FAILED if code == -1 else Outcome.RUNNING  # -2: slow by MC_SLICE_TIMEOUT, and still running

    def settle(self, devices: Sequence[str]) -> None:
        """Wait for everything that this process does on these GPUs, reads over NVLink among it."""
        for device in devices:
            torch.cuda.synchronize(device)

    def _register(self, regions: Sequence[Region]) -> None:
        with _gate, _on(regions[0].device):
            code = self._mooncake.batch_register_memory(
                [region.address for region in regions], [region.nbytes for region in regions]
            )
        if code:
            raise TransportUnavailable(
                f"Mooncake cannot register memory for {self.fabric} ({explain(code)}): {len(regions)} regions of "
                f"{sum(region.nbytes for region in regions):,} bytes on {regions[0].device}. "
                "MC_LOG_LEVEL=INFO in the environment shows why"
            )

    def _unregister(self, regions: Sequence[Region]) -> None:
        if self._forks != _forks:
            return
        try:
            with _gate, _on(regions[0].device):
                code = self._mooncake.batch_unregister_memory([region.address for region in regions])
        except TransferFailed:
            return  # the process is ending, and the engine with it
        if code:
            log.warning("Mooncake did not unregister %d regions: %s", len(regions), explain(code))

    def _identify(self, region: Region) -> int:
        return 0 if region.device == "cpu" else allocations.allocation_at(region.address).buffer_id

    def _check_process(self) -> None:
        if self._forks != _forks:
            raise TransferFailed("this session was opened before os.fork(); engines do not survive that. Use spawn")

    @staticmethod
    def _join(host: str, port: str) -> str:
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def __repr__(self) -> str:
        return f"<Engine {self.fabric} {self._join(self.host, str(self.port))}{' broken' * self.broken}>"


class Handshake:
    """What `Engine.meet` does, under way. Whoever begins one waits for it, to its end."""

    def __init__(self, engine: Engine, work: Callable[[Callable[[], None]], Any]) -> None:
        self._engine, self._work = engine, work
        self._error: Exception | None = None
        self._met, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="tensorfork-meet", daemon=True).start()

    def wait(self, deadline: float) -> None:
        """Until the peer has been met. Raises what `work` raised. If it hangs, raises `TransferFailed`, and the engine
        is broken.
        """
        self._wait(self._met, deadline)

    def end(self, deadline: float) -> None:
        """The same, until all is done."""
        self._wait(self._over, deadline)

    def _wait(self, event: threading.Event, deadline: float) -> None:
        try:
            if not event.wait(max(0.0, deadline - time.monotonic())):
                raise TransferFailed("the seed's engine did not answer by the deadline: it is stopped, or unreachable")
        finally:
            if not event.is_set():
                self._engine.broken = True
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work(self._met.set)
        except Exception as error:
            self._error = error
        finally:
            self._met.set()
            self._over.set()


def engine(fabric: str, host: str, nics: Sequence[str] = ()) -> Engine:
    """The process's engine on that fabric and host name, made now if there is none.

    Raises `TransportUnavailable` where it cannot be made.
    """
    key = (fabric, host, tuple(nics))
    with _lock:
        found = _engines.get(key)
        if found is None or found.broken:
            found = _engines[key] = Engine(fabric, host, nics)
        return found


def own(nonce: bytes) -> Engine | None:
    """The engine of this process that has this nonce."""
    with _lock:
        return next((one for one in _engines.values() if one.nonce == nonce), None)


def explain(code: int) -> str:
    """Mooncake's return code in words."""
    return f"{_CODES.get(code, 'unknown')}, code {code}"


def _on(device: str) -> ExitStack:
    """What a call about a device's memory needs: that device, and its context, as this thread's current ones (Mooncake
    asks the driver, which refuses a thread without a context), and not to break a graph that is being captured.
    """
    stack = ExitStack()
    if device != "cpu":
        stack.enter_context(torch.cuda.device(device))
        stack.enter_context(cuda.current_context(cuda.device_index(device)))
        stack.enter_context(cuda.relaxed_capture())
    return stack


_engines: dict[tuple[str, str, tuple[str, ...]], Engine] = {}
_lock = threading.RLock()
_gate = _Gate()
_forks = 0
atexit.register(lambda: _gate.shut())


def _after_fork() -> None:
    """In the child: its parent's engines are not its own, and their locks may be held by threads it does not have."""
    global _lock, _gate, _forks
    _lock, _gate, _forks = threading.RLock(), _Gate(), _forks + 1
    _engines.clear()


os.register_at_fork(after_in_child=_after_fork)
