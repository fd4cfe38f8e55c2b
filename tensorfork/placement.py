"""Which part of a distributed tensor a process holds."""

from typing import Any

from attrs import field, frozen
from attrs.validators import and_, instance_of, max_len

from tensorfork.validators import naturals_field


@frozen(repr=False)
class Placement:
    """The part of a `DTensor` that is here. Two parts of equal shape hold the same bytes only if this is equal too.

    Attributes:
        shape: the whole tensor's.
        how: its placement along each dimension of its mesh, with our index and the mesh's size there, such as
            ``Shard(dim=0) 1/4``; where it is replicated, without, as every index holds the same.
    """

    shape: tuple[int, ...] = field(validator=naturals_field)
    how: str = field(validator=and_(instance_of(str), max_len(4096)))

    @classmethod
    def of(cls, tensor: Any) -> "Placement":
        """That of a `DTensor`'s local shard."""
        mesh = tensor.device_mesh
        here = mesh.get_coordinate() or [-1] * mesh.ndim  # a rank outside of the mesh holds nothing
        parts = [
            repr(placement) if placement.is_replicate() else f"{placement!r} {index}/{mesh.size(dimension)}"
            for dimension, (placement, index) in enumerate(zip(tensor.placements, here, strict=True))
        ]
        return cls(tuple(tensor.shape), ", ".join(parts))

    def __repr__(self) -> str:
        return f"{self.how} of {self.shape}"
