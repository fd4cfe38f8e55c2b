"""Regions of memory, places in them, and copies between them: what transports are given.

Raw addresses live in `Region` and nowhere else. All sizes and offsets are bytes.
"""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from attrs import field, frozen


@frozen
class Region:
    """A contiguous range of this process's memory that a transport may read or write.

    `owner` keeps that memory alive. A transport whose library may go on writing after a failure refers to the owner
    until the library has stopped.

    Attributes:
        published: the (start, end) offsets that another process may read, sorted and without overlaps; None for all. A
            transport whose seed answers requests serves nothing else; one whose forks read by themselves cannot tell.
        stable: whether the owner promises that the memory stays mapped, and may be lent to a library that reads it
            later. Where it does not, host memory is read through `tensorfork.memory.host_reads`.
    """

    id: int
    address: int
    nbytes: int
    device: str
    owner: Any = field(default=None, eq=False, repr=False)
    published: Sequence[tuple[int, int]] | None = field(default=None, eq=False, repr=False)
    stable: bool = field(default=False, eq=False, repr=False)


@frozen
class RemoteRegion:
    """What the other process knows of a `Region`."""

    id: int
    nbytes: int
    device: str


@frozen
class Place:
    """Where something begins: a region's id, and the offset in that region."""

    region: int
    offset: int


@frozen
class Copy:
    """`nbytes` bytes from `offset` of the remote region `region` to `at` of our region `into`.

    `source` is the number of the seed to read from, in a fork that reads from several.
    """

    source: int
    region: int
    offset: int
    into: int
    at: int
    nbytes: int


def contains(region: Region | RemoteRegion, offset: int, nbytes: int) -> bool:
    """Whether `nbytes` bytes from `offset` on lie within a region; negative numbers never do."""
    return offset >= 0 <= nbytes and offset + nbytes <= region.nbytes


def may_read(region: Region, offset: int, nbytes: int) -> bool:
    """Whether another process may read `nbytes` bytes from `offset` on: they lie within one of its published ranges."""
    if not contains(region, offset, nbytes):
        return False
    if region.published is None:
        return True
    at = bisect_right(region.published, (offset, sys.maxsize)) - 1
    return at >= 0 and offset + nbytes <= region.published[at][1]
