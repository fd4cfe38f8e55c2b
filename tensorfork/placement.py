"""Which part of a distributed tensor a process holds."""

from typing import Any

from attrs import field, frozen
from attrs.validators import and_, instance_of, max_len

from tensorfork.validators import naturals_field


@frozen(repr=False)
class Placement:
    """The part of a `DTensor` that this process holds. Parts of equal shape hold the same bytes only if this is equal.

    Attributes:
        shape: the whole tensor's.
        how: its placement along each dimension of its mesh, with this process's index and the mesh's size there, such
            as ``Shard(dim=0) 1/4``; without them where it is replicated, because every index then holds the same.
    """

    shape: tuple[int, ...] = field(validator=naturals_field)
    how: str = field(validator=and_(instance_of(str), max_len(4096)))

    @classmethod
    def of(cls, tensor: Any) -> "Placement":
        """The placement of a `DTensor`'s local shard."""
        mesh = tensor.device_mesh
        indices = mesh.get_coordinate() or [-1] * mesh.ndim  # a rank outside of the mesh holds nothing
        parts = [
            repr(placement) if placement.is_replicate() else f"{placement!r} {index}/{mesh.size(dimension)}"
            for dimension, (placement, index) in enumerate(zip(tensor.placements, indices, strict=True))
        ]
        return cls(tuple(tensor.shape), ", ".join(parts))

    def __repr__(self) -> str:
        return f"{self.how} of {self.shape}"
