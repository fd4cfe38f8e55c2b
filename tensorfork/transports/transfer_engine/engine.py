"""Mooncake's engine. This is the only module that calls it, and that knows what its numbers mean.

There is one engine for each process, fabric, host name and choice of NICs. It is made when it is first needed and kept
until the process ends: its destructor holds the GIL for up to a second, and an engine without registrations is only two
listening ports and two idle threads. An engine is not used after `os.fork()`, nor after one of its calls has hung.

Mooncake never raises. It aborts the process if Python ends while a thread is inside a call, so every call goes through
a gate that is closed at exit. It crashes the process when asked for the status of a read that it has reported as over.
"""

import ctypes
import enum
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from attrs import frozen

from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.interpreter import ending
from tensorfork.interpreter.environment import environment
from tensorfork.interpreter.limits import require_descriptors
from tensorfork.memory import allocations, cuda
from tensorfork.regions import Region
from tensorfork.transports.transfer_engine import library
from tensorfork.transports.transfer_engine.peer_lock import PeerLock
from tensorfork.transports.transfer_engine.registrations import Registrations

log = logging.getLogger("tensorfork")

FABRICS = ("nvlink", "rdma", "tcp")
EXIT_TIMEOUT = 2.0
"""Seconds that Python's exit waits for calls to return."""

_TCP_CONNECTIONS = "MC_TCP_LANES_PER_PEER", "16"
"""After a failed read, a connection idles for a second before it takes the next read of its queue. With this many
connections for the 32 reads of a window, all of them have failed soon after the first."""
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


class ReadStatus(enum.Enum):
    """Whether a read is still running, and otherwise how it ended."""

    RUNNING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@frozen
class RemoteEngine:
    """An engine that may be read from.

    Attributes:
        host: a name or address of its host.
        port: where it listens.
        nonce: differs from that of any other engine that is or was at this host and port.
        fingerprint: of what it has registered; another one means that its description must be fetched again.
    """

    host: str
    port: int
    nonce: bytes
    fingerprint: bytes


class _CallGate:
    """Counts the threads inside Mooncake. Once closed, it raises `TransferFailed` on entry."""

    def __init__(self) -> None:
        self._inside, self._closed = 0, False
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        with self._changed:
            if self._closed:
                raise TransferFailed("the process is ending")
            self._inside += 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._inside -= 1
            if self._closed:
                self._changed.notify_all()

    def close(self) -> None:
        """Admit no further call, and wait up to `EXIT_TIMEOUT` for those inside to return."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside, EXIT_TIMEOUT)


class Engine:
    """One engine. Its methods are for any thread. They do not check that addresses lie within the caller's memory.

    Attributes:
        fabric: nvlink, rdma or tcp.
        host: the name by which peers reach it.
        port: where it listens for them.
        nonce: see `RemoteEngine`.
        registrations: what is registered with it.
        broken: whether a call of it hung; `get_engine` then makes another engine.
    """

    def __init__(self, fabric: str, host: str, nics: Sequence[str]) -> None:
        require_descriptors()  # without, the library ends the process
        module = library.load()
        if fabric == "nvlink" and not getattr(module, "SUPPORT_INTRA_NVLINK", True):
            raise TransportUnavailable(
                f"{library.installed_wheel()} was built without NVLink within a host; use another fabric"
            )
        if ":" in host and "MC_USE_IPV6" not in os.environ:
            raise TransportUnavailable(f"{host}: for IPv6, set MC_USE_IPV6=1 in the environment of both processes")
        self.fabric, self.host = fabric, host
        self.nonce, self.broken = secrets.token_bytes(8), False
        self._fork_count, self._peer_lock = _fork_count, PeerLock()
        self._descriptions: dict[tuple[str, int], dict[bytes, int]] = {}
        self._contacted: set[str] = set()
        connections = {_TCP_CONNECTIONS[0]: os.environ.get(*_TCP_CONNECTIONS)}
        with _call_gate, environment(library.ENVIRONMENT[fabric], connections):
            self._mooncake: Any = module.TransferEngine()
            protocol = "rdma" if fabric == "rdma" else "tcp"  # nvlink too: the environment selects it
            code = self._mooncake.initialize(host, "P2PHANDSHAKE", protocol, ",".join(nics))
            if code:
                raise TransportUnavailable(
                    f"Mooncake cannot start on {fabric} at {host} ({explain(code)}); MC_LOG_LEVEL=INFO in the "
                    "environment shows why. Check the NICs, and that MC_MIN_RPC_PORT to MC_MAX_RPC_PORT has free ports"
                )
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._mooncake))  # never destroyed, see above
            self.port = int(self._mooncake.get_rpc_port())
        self.registrations = Registrations(self._register, self._unregister, self._mapping_id)

    def address_of(self, peer: RemoteEngine) -> str:
        """The address by which `start_read` and `read_batch` reach a peer.

        An engine fetches the description of a peer, with its registrations, once for each address. So a peer whose
        registrations have changed gets another address: one with zeros before the port, which reaches the same port.
        """
        if peer.nonce == self.nonce:
            return _host_and_port(self.host, str(self.port))
        with _lock:
            descriptions = self._descriptions.setdefault((peer.host, peer.port), {})
            zeros = descriptions.setdefault(peer.nonce + peer.fingerprint, len(descriptions))
        return _host_and_port(peer.host, "0" * zeros + str(peer.port))

    def has_contacted(self, address: str) -> bool:
        """Whether `read_batch` has read from this address before. Handles over nvlink, once opened, stay open."""
        return address in self._contacted

    def start_read(
        self,
        address: str,
        into: int,
        source: int,
        nbytes: int,
        device: str,
        deadline: float,
        stop: threading.Event | None = None,
    ) -> int:
        """Start a read, and return its transfer id, for `status`.

        The caller must call `status` until the read is over. Raises `TransferFailed` if the read does not start, as it
        does not once `stop` is set.
        """
        self._check_process()
        with self._peer_lock.acquire(deadline, exclusive=True, stop=stop), _call_gate, _current_device(device):
            transfer_id = int(self._mooncake.batch_transfer_async_read(address, [into], [source], [nbytes]))
        if not transfer_id:
            raise TransferFailed(
                f"Mooncake refused to read from {address}: nobody answers there, or the memory is not registered there"
            )
        return transfer_id

    def read_batch(
        self,
        address: str,
        batch: Sequence[tuple[int, int, int]],
        device: str,
        deadline: float,
        stop: threading.Event | None = None,
    ) -> None:
        """Make a batch of reads (into, source, nbytes), all into memory of one device, and wait for them.

        A batch that has begun is waited for, whatever the deadline. It does not begin once `stop` is set, or where the
        first read of another peer keeps the engine until the deadline.

        Raises `TransferFailed` if it does not begin, or fails. Nothing is written after that.
        """
        self._check_process()
        into, sources, sizes = (list(column) for column in zip(*batch, strict=True))
        exclusive = address not in self._contacted
        with (
            self._peer_lock.acquire(deadline, exclusive=exclusive, stop=stop),
            _call_gate,
            _current_device(device),
        ):
            code = self._mooncake.batch_transfer_sync_read(address, into, sources, sizes)
        if code:
            self.synchronize([device])
            raise TransferFailed(
                f"Mooncake failed to read from {address} ({explain(code)}): its process died, or the memory is not "
                "registered there any more"
            )
        self._contacted.add(address)

    def status(self, transfer_id: int) -> ReadStatus:
        """The status of a read. Must not be called again for a read that is over."""
        self._check_process()
        with _call_gate:
            code = self._mooncake.transfer_check_status(transfer_id)
        if code == 1:
            return ReadStatus.DONE
        return ReadStatus.FAILED if code == -1 else ReadStatus.RUNNING  # -2: slow by MC_SLICE_TIMEOUT, still running

    def synchronize(self, devices: Sequence[str]) -> None:
        """Wait for all work of this process on these GPUs, reads over NVLink included."""
        for device in devices:
            torch.cuda.synchronize(device)

    def _register(self, regions: Sequence[Region]) -> None:
        with _call_gate, _current_device(regions[0].device):
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
        if self._fork_count != _fork_count:
            return
        try:
            with _call_gate, _current_device(regions[0].device):
                code = self._mooncake.batch_unregister_memory([region.address for region in regions])
        except TransferFailed:
            return  # the process is ending, and the engine with it
        if code:
            log.warning("Mooncake did not unregister %d regions: %s", len(regions), explain(code))

    def _mapping_id(self, region: Region) -> int:
        return 0 if region.device == "cpu" else allocations.allocation_at(region.address).buffer_id

    def _check_process(self) -> None:
        if self._fork_count != _fork_count:
            raise TransferFailed("this session was opened before os.fork(); engines do not survive that. Use spawn")

    def __repr__(self) -> str:
        return f"<Engine {self.fabric} {_host_and_port(self.host, str(self.port))}{' broken' * self.broken}>"


def get_engine(fabric: str, host: str, nics: Sequence[str] = ()) -> Engine:
    """The process's engine on that fabric and host name. It is made now if there is none, or only a broken one.

    Raises `TransportUnavailable` where it cannot be made, `ResourceExhausted` where few descriptors are left for it.
    """
    key = (fabric, host, tuple(nics))
    with _lock:
        found = _engines.get(key)
        if found is None or found.broken:
            found = _engines[key] = Engine(fabric, host, nics)
        return found


def local_engine(nonce: bytes) -> Engine | None:
    """The engine of this process that has this nonce; None if it belongs to another process."""
    with _lock:
        return next((one for one in _engines.values() if one.nonce == nonce), None)


def set_thread_device(device: str) -> None:
    """Make a GPU this thread's current device until the thread ends; does nothing for "cpu".

    For threads that call Mooncake. When such a thread ends, Mooncake switches to the device that was current at first,
    and creates a CUDA context on it.
    """
    if device != "cpu":
        torch.cuda.set_device(device)


def explain(code: int) -> str:
    """Mooncake's return code in words."""
    return f"{_CODES.get(code, 'unknown')}, code {code}"


def _host_and_port(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def _current_device(device: str) -> Iterator[None]:
    """What a call about memory of a device needs. Inside, the device and its context are this thread's current ones
    (Mooncake asks the driver, which refuses a thread without a context), and a CUDA graph that is being captured does
    not break.
    """
    if device == "cpu":
        yield
        return
    with torch.cuda.device(device), cuda.current_context(cuda.device_index(device)), cuda.relaxed_capture():
        yield


_engines: dict[tuple[str, str, tuple[str, ...]], Engine] = {}
_lock = threading.RLock()
_call_gate = _CallGate()
_fork_count = 0
ending.after_exit(lambda: _call_gate.close())


def _after_fork() -> None:
    """In the child: drop the parent's engines, and the locks, which threads that do not exist here may hold."""
    global _lock, _call_gate, _fork_count
    _lock, _call_gate, _fork_count = threading.RLock(), _CallGate(), _fork_count + 1
    _engines.clear()


os.register_at_fork(after_in_child=_after_fork)
