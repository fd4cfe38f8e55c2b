"""A proxy between forks and a seed that replays, reorders, truncates and swaps whole messages, in both directions, of
the conversations and of the data connections.
"""

import random
import threading
from typing import Any, NamedTuple

import zmq

from tensorfork.sockets.port import TO_TOKEN


class Message(NamedTuple):
    """One message on its way: `to_seed` or to the fork, on the connection of `peer`, which carries `data` or not."""

    to_seed: bool
    peer: bytes
    data: bool
    frames: list[bytes]


class Meddling:
    """What becomes of messages; here they pass. `times` counts what was done to them."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.times = draw, 0

    def instead(self, message: Message) -> list[Message]:
        """What is passed on in place of a message."""
        return [message]

    def idle(self) -> list[Message]:
        """What is passed on when nothing has come for a while."""
        return []


class Replay(Meddling):
    """Some messages are followed by an earlier one of the same connection and direction, or by themselves."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._past: dict[tuple[bool, bytes], list[Message]] = {}

    def instead(self, message: Message) -> list[Message]:
        past = self._past.setdefault((message.to_seed, message.peer), [])
        past.append(message)
        if self.draw.random() > 0.2:
            return [message]
        self.times += 1
        return [message, self.draw.choice(past)]


class Reorder(Meddling):
    """Some messages come behind the next one of their connection and direction."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._held: dict[tuple[bool, bytes], Message] = {}

    def instead(self, message: Message) -> list[Message]:
        held = self._held.pop((message.to_seed, message.peer), None)
        if held is not None:
            self.times += 1
            return [message, held]
        if self.draw.random() > 0.3:
            return [message]
        self._held[message.to_seed, message.peer] = message
        return []

    def idle(self) -> list[Message]:
        held, self._held = list(self._held.values()), {}
        return held


class Truncate(Meddling):
    """Some messages lose their last frame, or a part of it."""

    def instead(self, message: Message) -> list[Message]:
        if self.draw.random() > 0.1:
            return [message]
        self.times += 1
        *first, last = message.frames
        shorter = last[: self.draw.randrange(len(last))] if last else b""
        frames = first if first and self.draw.random() < 0.5 else [*first, shorter]
        return [message._replace(frames=frames)]


class Swap(Meddling):
    """Messages of one kind and direction change places between two connections."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._held: dict[tuple[bool, bool], Message] = {}

    def instead(self, message: Message) -> list[Message]:
        held = self._held.get((message.to_seed, message.data))
        if held is not None and held.peer != message.peer:
            del self._held[message.to_seed, message.data]
            self.times += 1
            return [message._replace(peer=held.peer), held._replace(peer=message.peer)]
        if held is not None or self.draw.random() > 0.5:
            return [message]
        self._held[message.to_seed, message.data] = message
        return []

    def idle(self) -> list[Message]:
        held, self._held = list(self._held.values()), {}
        return held


class SwapBytes(Meddling):
    """The bytes of answers that are of one size change places between two connections; all else stays in its order."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._held: dict[bytes, list[Message]] = {}

    def instead(self, message: Message) -> list[Message]:
        if message.to_seed or not message.data:
            return [message]
        if message.peer in self._held:
            self._held[message.peer].append(message)
            return []
        if len(message.frames) == 1:
            return [message]
        *header, ours = message.frames
        for peer, (first, *others) in self._held.items():
            if len(first.frames[-1]) == len(ours):
                del self._held[peer]
                self.times += 1
                return [
                    message._replace(frames=[*header, first.frames[-1]]),
                    first._replace(frames=[*first.frames[:-1], ours]),
                    *others,
                ]
        self._held[message.peer] = [message]
        return []

    def idle(self) -> list[Message]:
        held, self._held = [message for one in self._held.values() for message in one], {}
        return held


class Meddler:
    """The proxy. Entering it gives its address; leaving it ends all of its connections. With `data_alone`, it passes on
    the conversations as they are.
    """

    def __init__(self, address: str, meddling: Meddling, *, data_alone: bool) -> None:
        self._data_alone = data_alone
        self._seed, self._meddling, self._ended = address, meddling, threading.Event()
        self._context: zmq.Context[Any] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._carry_data: set[bytes] = set()
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
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._ended.is_set():
            ready = dict(poller.poll(20))
            if not ready:
                self._pass_on(self._meddling.idle())
            if self._front in ready:
                peer, *frames = self._front.recv_multipart()
                if peer not in self._backs:
                    self._begin(peer, frames, poller)
                self._meddle(True, peer, frames)
            for peer, back in list(self._backs.items()):
                if back in ready:
                    self._meddle(False, peer, back.recv_multipart())

    def _begin(self, peer: bytes, frames: list[bytes], poller: zmq.Poller) -> None:
        back = self._backs[peer] = self._context.socket(zmq.DEALER)
        back.connect(self._seed)
        poller.register(back, zmq.POLLIN)
        if frames[0].startswith(TO_TOKEN):
            self._carry_data.add(peer)

    def _meddle(self, to_seed: bool, peer: bytes, frames: list[bytes]) -> None:
        message = Message(to_seed, peer, peer in self._carry_data, frames)
        as_it_is = self._data_alone and not message.data
        self._pass_on([message] if as_it_is else self._meddling.instead(message))

    def _pass_on(self, messages: list[Message]) -> None:
        for message in messages:
            if message.to_seed:
                self._backs[message.peer].send_multipart(message.frames)
            else:
                self._front.send_multipart([message.peer, *message.frames])
