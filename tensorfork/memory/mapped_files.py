"""Host memory that maps files, and memory that cannot be written, as the kernel lists it in ``/proc/self/maps``.

A load or a store beyond the end of a file that was truncated is a SIGBUS, and a store to read-only memory a SIGSEGV:
both end the process. So whoever publishes such memory or fills it asks first. Nothing here touches the memory itself.
"""

import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import frozen

Spans = Mapping[str, tuple[int, int]]
"""By the names of tensors, where their memory begins and ends."""


@frozen
class _Mapping:
    start: int
    end: int
    rights: str
    """Such as ``r--p``."""
    offset: int
    """In the file, of the first byte."""
    inode: int
    path: str

    def size(self) -> int | None:
        """The file's size now, in bytes; None where the path is no file, or another one than is mapped."""
        try:
            status = os.stat(self.path)
        except (OSError, ValueError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) and status.st_ino == self.inode else None


@frozen
class MappedFiles:
    """The files that tensors' memory maps, to tell later whether one was truncated."""

    _needs: Sequence[tuple[_Mapping, Sequence[tuple[str, int]]]]
    """For each mapping, the tensors in it, and up to where in the file each of them reaches."""

    @classmethod
    def of(cls, spans: Spans) -> "MappedFiles":
        """The files under these tensors."""
        return cls._of(_overlaps(spans))

    @classmethod
    def _of(cls, overlaps: Iterable[tuple[str, int, _Mapping]]) -> "MappedFiles":
        needs: dict[_Mapping, list[tuple[str, int]]] = {}
        for name, end, mapping in overlaps:
            if mapping.inode:
                needs.setdefault(mapping, []).append((name, mapping.offset + min(end, mapping.end) - mapping.start))
        return cls(list(needs.items()))

    def truncated(self, *, folders: bool = False) -> dict[str, str]:
        """The tensors that reach beyond the end of their file, by name, in words. Asks for the size of each file.

        `folders` is whether the words have the whole path, which forks need not know.
        """
        found: dict[str, str] = {}
        for mapping, needs in self._needs:
            path = mapping.path if folders else os.path.basename(mapping.path)
            if (size := mapping.size()) is not None:
                for name, needed in needs:
                    if needed > size:
                        found[name] = (
                            f"its memory maps the file {path}, which was truncated: it needs {needed:,} bytes of it, "
                            f"and {size:,} are left; load the model again"
                        )
        return found


def why_not_usable(spans: Spans, *, writing: bool) -> dict[str, str]:
    """The tensors that cannot be read now, or with `writing` not written, by name, in words."""
    overlaps = list(_overlaps(spans))
    found = MappedFiles._of(overlaps).truncated(folders=True)
    for name, _, mapping in overlaps:
        if mapping.rights[0] != "r":
            found.setdefault(name, "its memory cannot be read: it was protected, or belongs to nobody")
        elif writing and mapping.rights[1] != "w":
            of = f" (it maps {mapping.path})" if mapping.inode else ""
            found.setdefault(
                name,
                f"its memory is read-only{of}, and storing to it would end the process. Give the model memory of its "
                "own (clone it, or map the file copy-on-write), or fork into a model on the meta device",
            )
    return found


def any_in(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether some of this memory, sorted and without overlaps, maps a file, or cannot be read or written."""
    starts = [start for start, _ in ranges]
    for mapping in _mappings():
        at = bisect_left(starts, mapping.end)
        if at and ranges[at - 1][1] > mapping.start:
            return True
    return False


def why_unreadable(address: int) -> str:
    """What to add to the report of an address that could not be read; empty where nothing is known."""
    for mapping in _mappings():
        if mapping.start <= address < mapping.end and mapping.inode:
            return f": it maps {mapping.path}, which ends before that; it was truncated"
    return ""


def _overlaps(spans: Spans) -> Iterator[tuple[str, int, _Mapping]]:
    """Each tensor's name and end, with each mapping that has some of its bytes."""
    if not spans:
        return
    mappings = list(_mappings())
    starts = [mapping.start for mapping in mappings]
    for name, (start, end) in spans.items():
        at = max(bisect_right(starts, start) - 1, 0)
        while at < len(mappings) and starts[at] < end:
            if mappings[at].end > start:
                yield name, end, mappings[at]
            at += 1


def _mappings() -> Iterator[_Mapping]:
    """This process's mappings of files and its memory that is not both readable and writable, by address.

    There are some hundreds of them, and reading the list takes a millisecond. None where there is no such list.
    """
    try:
        with open("/proc/self/maps", errors="surrogateescape") as lines:
            for line in lines:
                if " rw-p 00000000 00:00 0" not in line:
                    addresses, rights, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
                    start, _, end = addresses.partition("-")
                    yield _Mapping(int(start, 16), int(end, 16), rights, int(offset, 16), int(inode), "".join(path))
    except OSError:
        return
