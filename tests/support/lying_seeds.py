"""A proxy between forks and a seed that changes what the seed says, or keeps it back."""

import threading
from collections.abc import Callable
from typing import Any

import msgpack
import zmq


class Liar:
    """A proxy: forwards requests as they are, and each reply as `lie` returns it, as many times as `times` says."""

    def __init__(
        self,
        address: str,
        lie: Callable[[list[bytes]], list[bytes] | None],
        times: Callable[[list[bytes]], int] = lambda frames: 1,
    ) -> None:
        self._times = times
        self._context: zmq.Context[Any] = zmq.Context()
        self._front, self._back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        self._lie, self._ended = lie, threading.Event()
        self.address = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._back.connect(address)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> str:
        self._thread.start()
        return self.address

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        poller, peer = zmq.Poller(), b""
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not self._ended.is_set():
            ready = dict(poller.poll(20))
            if self._front in ready:
                peer, *frames = self._front.recv_multipart()
                self._back.send_multipart(frames)
            if self._back in ready:
                frames = self._lie(self._back.recv_multipart())
                if frames is not None:
                    for _ in range(self._times(frames)):
                        self._front.send_multipart([peer, *frames])


def kind_of(frames: list[bytes]) -> str:
    return str(msgpack.unpackb(frames[0])[3])
