"""One digest of a whole model's content, over the names and digests of its tensors."""

from collections.abc import Mapping
from hashlib import blake2b

from tensorfork.digest.definition import NAME

_ROOT_BYTES = 16


def content_root(digests: Mapping[str, int]) -> bytes:
    """The root, 16 bytes, over tensors' names and their digests, whatever their order; the same on every machine.

    BLAKE2b over each name, by length and UTF-8 bytes, and its digest, in the order of the encoded names, personalised
    by the digest's own name.
    """
    root = blake2b(digest_size=_ROOT_BYTES, person=NAME.encode())
    for name, value in sorted((name.encode(errors="surrogatepass"), value) for name, value in digests.items()):
        root.update(len(name).to_bytes(4, "little") + name + value.to_bytes(8, "little"))
    return root.digest()
