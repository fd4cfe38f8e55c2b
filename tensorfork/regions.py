"""Regions of memory, places in them, and copies between them: the terms in which transports are spoken to.

Raw addresses live in `Region` and nowhere else. All sizes and offsets are bytes.
"""

from typing import Any

from attrs import field, frozen


@frozen
class Region:
    """A stretch of this process's memory that a transport may touch.

    `owner` keeps that memory alive. A transport whose library goes on writing after a failure, and cannot be stopped,
    holds the owner until the library has stopped.
    """

    id: int
    address: int
    nbytes: int
    device: str
    owner: Any = field(default=None, eq=False, repr=False)


@frozen
class RemoteRegion:
    """What the other side is told of a `Region`."""

    id: int
    nbytes: int
    device: str


@frozen
class Place:
    """Where the first byte of something lies: a region's id, and the offset in it."""

    region: int
    offset: int


@frozen
class Copy:
    """`nbytes` bytes from `offset` of the remote region `region` to `at` of our region `into`.

    `source` says which seed, by its number in a fork that reads from several.
    """

    source: int
    region: int
    offset: int
    into: int
    at: int
    nbytes: int
