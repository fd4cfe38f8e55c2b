"""A fake of the CUDA driver's queries about memory; needs no GPU."""

import ctypes
from typing import Any

from attrs import define, field


@define
class Driver:
    """Answers from `memory`: by address, (bytes, buffer id, whether CUDA IPC can export it).

    Like the real one, it says for an address in `reserved`, (start, end), that the range around it is the reservation,
    mapped or not. `queries` records each query: for an "allocation", or a buffer "id".
    """

    memory: dict[int, tuple[int, int, bool]]
    reserved: tuple[int, int] = (0, 0)
    queries: list[str] = field(factory=list)

    def find(self, address: int) -> tuple[int, tuple[int, int, bool]] | None:
        return next(((start, it) for start, it in self.memory.items() if start <= address < start + it[0]), None)

    def cuPointerGetAttributes(self, count: int, kinds: Any, values: Any, address: int) -> int:  # noqa: N802
        self.queries.append("allocation")
        start, (nbytes, id, exportable) = self.find(address) or (0, (0, 0, False))
        if self.reserved[0] <= address < self.reserved[1]:
            start, nbytes = self.reserved[0], self.reserved[1] - self.reserved[0]
        results = {7: id, 9: 0 if id else -2, 10: int(exportable), 11: start, 12: nbytes}
        for i in range(count):
            kind = ctypes.c_int if kinds[i] in (9, 10) else ctypes.c_uint64
            kind.from_address(values[i]).value = results[kinds[i]]
        return 0

    def cuPointerGetAttribute(self, value: Any, kind: int, address: int) -> int:  # noqa: N802
        assert kind == 7
        self.queries.append("id")
        found = self.find(address)
        if found is None:
            return 1
        value._obj.value = found[1][1]
        return 0
