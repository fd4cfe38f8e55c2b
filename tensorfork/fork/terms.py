"""The terms of a fork: the arguments of `tensorfork.fork_into` that its steps need, checked before anything happens."""

import math
import time
from collections.abc import Callable
from threading import Event
from typing import Any

import torch
from attrs import field, frozen
from attrs.validators import instance_of, optional

from tensorfork.fork.trace import trace_id
from tensorfork.fork.transport_choice import transports_to_try
from tensorfork.identity import Identity, Rank
from tensorfork.lineage import AtLeast, Wanted, check_wanted
from tensorfork.model.devices import usable_device
from tensorfork.transports.base import Transport
from tensorfork.validators import Field, flag, natural_number, seconds, stall_seconds
from tensorfork.wire.conversation import STALL

Progress = Callable[[int, int], None]
"""Called with the bytes that have arrived and the bytes in all, on the thread that called `fork_into` or `fork`."""


_EVENT_POLL = 0.05
"""Seconds between two checks, while the caller's event is waited for, whether ours is set."""


def _timeout(given: Any) -> float:
    return seconds("timeout", given)


def _wait(given: Any) -> float:
    return seconds("wait", given, zero=True, most=math.inf)  # the timeout is its limit


def _stall(given: Any) -> float:
    return stall_seconds("stall", given)


def _restarts(given: Any) -> int:
    return natural_number("restarts", given)


class _EventBeside(Event):
    """Set when it is, or when the caller's is: the caller's may be another process's too, and is only looked at."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self._given = given

    def is_set(self) -> bool:
        return super().is_set() or bool(self._given.is_set())

    def wait(self, timeout: float | None = None) -> bool:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self.is_set() and time.monotonic() < end:
            self._given.wait(min(_EVENT_POLL, max(0.0, end - time.monotonic())))
        return self.is_set()


def _event(given: Any) -> Event:
    if given is None:
        return Event()
    if not callable(getattr(given, "is_set", None)) or not callable(getattr(given, "wait", None)):
        raise TypeError(f"cancel must be a threading.Event, not {type(given).__name__}")
    return _EventBeside(given)


def _callable_field(instance: object, attribute: Field, value: object) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{attribute.name} must be a function of two numbers, not {type(value).__name__}")


def _flag_field(instance: object, attribute: Field, value: object) -> None:
    flag(attribute.name, value)


@frozen(eq=False, repr=False, kw_only=True)
class Terms:
    """`tensorfork.fork_into` describes each. Made when the fork begins, since `deadline` is counted from then.

    Raises `TypeError` and `ValueError` for what cannot be, and `TransportUnavailable` for an unknown transport.

    Attributes:
        transports: those to try, in order.
        trace: the caller's trace id, or a random one.
        cancel: set once the caller's is, from any thread, or when the process ends.
    """

    timeout: float = field(converter=_timeout)
    wait: float = field(default=0.0, converter=_wait)
    stall: float = field(default=STALL, converter=_stall)
    restarts: int = field(default=0, converter=_restarts)
    cancel: Event = field(default=None, converter=_event)
    device: torch.device | None = field(default=None, converter=usable_device)
    arena: bool = field(default=True, validator=_flag_field)
    verify: bool = field(default=True, validator=_flag_field)
    progress: Progress | None = field(default=None, validator=_callable_field)
    identity: Identity | None = field(default=None, validator=optional(instance_of(Identity)))
    rank: Rank | None = field(default=None, validator=optional(instance_of(Rank)))
    version: Wanted = None
    at_least: AtLeast = None
    trace: str = field(default=None, converter=trace_id)
    transports: tuple[Transport, ...] = field(default="auto", converter=transports_to_try)
    deadline: float = field(init=False)

    @deadline.default
    def _deadline(self) -> float:
        return time.monotonic() + self.timeout

    @property
    def wait_until(self) -> float:
        """Until when the fork waits for a seed that is starting, or suspended."""
        return min(self.deadline, self.deadline - self.timeout + self.wait)

    @property
    def named_devices(self) -> set[torch.device]:
        """The device that the caller named, as a set: empty if none."""
        return set() if self.device is None else {self.device}

    def __attrs_post_init__(self) -> None:
        check_wanted(self.version, self.at_least)
