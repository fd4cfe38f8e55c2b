"""The digests of a model's tensors, as callers get them."""

from collections.abc import Callable, Iterator, Mapping

from attrs import frozen

from tensorfork.digest.content import content_root
from tensorfork.digest.definition import NAME
from tensorfork.lineage import Version


@frozen(eq=False, repr=False)
class Digests(Mapping[str, str]):
    """The digest of each tensor's bytes, by name: 64 bits, as 16 hexadecimal digits.

    The same bytes in the same order have the same digest, on CPUs and GPUs, on every machine. Dtype and shape do not
    enter, and the order is that in memory: a tensor has another digest once it was transposed and made contiguous. Two
    `Digests` are equal if names and digests are; versions are not compared. Digests are against accident: somebody who
    wants to can make other bytes that have the same.

    Attributes:
        content: one digest over the names and digests of all that the seed publishes, whatever was selected, as 32
            hexadecimal digits: that in `Version.content`. For a model of this process: over what was selected.
        version: which weights the seed has; None for a model of this process.
        generation: the seed's, at which they are the digests; None for a model of this process.
        algorithm: the name of the digest's definition.
    """

    _by_name: Mapping[str, str]
    content: str
    version: Version | None = None
    generation: int | None = None
    algorithm: str = NAME

    @classmethod
    def of(cls, values: Mapping[str, int], version: Version | None = None, generation: int | None = None) -> "Digests":
        """The record of these digests, which are of all tensors."""
        by_name = {name: f"{value:016x}" for name, value in values.items()}
        return cls(by_name, content_root(values).hex(), version, generation)

    def only(self, selects: Callable[[str], bool]) -> "Digests":
        """Those of the tensors whose names are selected, with the `content` of all."""
        chosen = {name: value for name, value in self.items() if selects(name)}
        return Digests(chosen, self.content, self.version, self.generation, self.algorithm)

    def __getitem__(self, name: str) -> str:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        version = "" if self.version is None else f", version {self.version}"
        return f"<Digests of {len(self):,} tensors, content {self.content}{version}>"
