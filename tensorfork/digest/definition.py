"""The digest of a tensor: 64 bits, the same on CPU and GPU. It guards against accidents, not against attackers.

The definition. A tensor's bytes are read in the order in which they lie in memory (dimensions by falling stride).
Elements that expanding or sliding windows repeat are read once (`elements.read_once`). The bytes are cut into pieces of
PIECE bytes, 8 MiB, from the first byte on; the last piece has what is left. PIECE is a multiple of the size of every
element, so none lies in two pieces. Each piece has a digest, as if it were a tensor of its own; the tensor's digest is
the root over those of its pieces.

A piece's digest. Its bytes are little-endian 64-bit words x[0..n), the last one padded with zeros. All arithmetic is on
integers modulo 2^64, so the order of additions does not matter, and every device gets the same result. Three families
of sums are taken:

    c[j] = sum of x[1021 i + j] over i             (columns)
    d[j] = sum of x[1031 i + j] over i             (columns at another width)
    r[i] = sum of x[1021 i + j] over j < 1021      (rows)

Each of these sums, in this order, is split into its low and its high 32 bits, taken as signed integers. The digest is
the sum of all these halves, each times a 64-bit odd pseudo-random weight of its own: the multilinear hash of Carter and
Wegman, in the form that Lemire and Kaser gave it (Strongly universal string hashing is fast, 2014). The weights are
made by the finaliser of Steele, Lea and Flood's SplitMix64.

The root. Of one piece, it is that piece's digest; of none, zero. Of several, it is BLAKE2b, 8 bytes long and
personalised by NAME, over the pieces' digests, 8 bytes each; everything little-endian.

Why three families, and these widths. Rows and columns detect every changed, moved and exchanged word, but not four
equal and opposite changes at the corners of a rectangle: two words of one row, and two of another in the same columns.
The third family always detects those: 1031 is prime, and larger than the length of a row and than the 1028 rows of a
piece, so no two words of a row, and no two of a column, share one of its sums. A change within a piece that is not
detected needs six or more words whose changes cancel out in all three families; across pieces, nothing cancels out.
Both widths are odd because torch then does not split the sums of columns over blocks, which takes 16 MiB of scratch
and more.

`torch_digests` computes it in plain torch on any device; `batch` does so with a kernel on NVIDIA GPUs.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b

from tensorfork.digest.sums import COLUMNS, OTHER_WIDTH, WIDTH

PIECE = 8 << 20
"""Bytes of a piece."""
NAME = "sums4/1"
"""Names this definition on the wire: two sides compare digests only when they compute the same thing."""

ODD = 0xBF58476D1CE4E5B9
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1

Pieces = tuple[int, ...]
"""The digests of a tensor's pieces, in order, as unsigned 64-bit integers."""


def root(pieces: Sequence[int]) -> int:
    """The digest of a tensor whose pieces have these."""
    if len(pieces) < 2:
        return pieces[0] if pieces else 0
    packed = b"".join([piece.to_bytes(8, "little") for piece in pieces])
    return int.from_bytes(blake2b(packed, digest_size=8, person=NAME.encode()).digest(), "little")


def roots(pieces: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The digest of each tensor, by name, from those of its pieces."""
    return {name: found[0] if len(found) == 1 else root(found) for name, found in pieces.items()}


def differing(ours: Sequence[int], theirs: Sequence[int], nbytes: int) -> Iterator[tuple[int, int]]:
    """The ranges of bytes, as (begin, end), of a tensor of `nbytes` bytes in which pieces differ. Neighbours make one.

    Bytes are counted as the definition reads them.
    """
    begin = None
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other and begin is None:
            begin = i * PIECE
        elif mine == other and begin is not None:
            yield begin, i * PIECE
            begin = None
    if begin is not None:
        yield begin, nbytes


def mix(value: int) -> int:
    """A bijection of 64-bit integers: two xor-shifts around a multiplication."""
    value &= MASK
    value ^= value >> 32
    value = value * ODD & MASK
    return value ^ (value >> 29)


@cache
def weight(index: int) -> int:
    """The odd weight of one half of a sum."""
    return mix((index + 1) * GOLDEN) | 1


def pieces_of_words(words: Sequence[int], piece: int = PIECE) -> Pieces:
    """The pieces of a tensor of 64-bit words by the definition above, word for word. Slow: tests compare with it.

    `piece` stands for PIECE, in bytes.
    """
    return tuple(_piece_of_words(words[start : start + piece // 8]) for start in range(0, len(words), piece // 8))


def _piece_of_words(words: Sequence[int]) -> int:
    sums = [0] * (COLUMNS + -(-len(words) // WIDTH))
    for k, word in enumerate(words):
        sums[k % WIDTH] += word
        sums[WIDTH + k % OTHER_WIDTH] += word
        sums[COLUMNS + k // WIDTH] += word
    halves = [half for v in sums for half in (_signed_half(v), _signed_half(v >> 32))]
    return sum(half * weight(k) for k, half in enumerate(halves) if half) & MASK


def _signed_half(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
