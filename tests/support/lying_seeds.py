"""A proxy between forks and a seed that changes what the seed says, or keeps it back."""

import threading
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

from tensorfork.sockets.port import TO_TOKEN


class Liar:
    """A proxy: forwards requests as they are, and each reply as `lie` returns it, as many times as `times` says.

    What a transport sends over the same port is forwarded as it is.
    """

    def __init__(
        self,
        address: str,
        lie: Callable[[list[bytes]], list[bytes] | None],
        times: Callable[[list[bytes]], int] = lambda frames: 1,
    ) -> None:
        self._times = times
        self._context: zmq.Context[Any] = zmq.Context()
        self._front, self._behind = self._context.socket(zmq.ROUTER), address
        self._lie, self._ended = lie, threading.Event()
        self.address = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> str:
        self._thread.start()
        return self.address

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        poller, backs = zmq.Poller(), dict[bytes, "zmq.Socket[bytes]"]()
        lied_to = set[bytes]()
        poller.register(self._front, zmq.POLLIN)
        try:
            self._forward(poller, backs, lied_to)
        finally:
            for back in backs.values():
                back.close(0)

    def _forward(self, poller: zmq.Poller, backs: "dict[bytes, zmq.Socket[bytes]]", lied_to: set[bytes]) -> None:
        while not self._ended.is_set():
            ready = dict(poller.poll(20))
            if self._front in ready:
                peer, *frames = self._front.recv_multipart()
                if peer not in backs:
                    backs[peer] = self._context.socket(zmq.DEALER)
                    backs[peer].connect(self._behind)
                    poller.register(backs[peer], zmq.POLLIN)
                    if not frames[0].startswith(TO_TOKEN):
                        lied_to.add(peer)
                backs[peer].send_multipart(frames)
            for peer, back in backs.items():
                if back in ready:
                    frames = back.recv_multipart()
                    told = self._lie(frames) if peer in lied_to else frames
                    for _ in range(0 if told is None else self._times(told) if peer in lied_to else 1):
                        self._front.send_multipart([peer, *told])


def kind_of(frames: list[bytes]) -> str:
    return str(msgpack.unpackb(frames[0])[3])
