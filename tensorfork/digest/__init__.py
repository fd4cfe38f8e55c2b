"""Digests of tensors: the definition and its sums, many tensors at once, and tensors whose bytes are arriving."""
