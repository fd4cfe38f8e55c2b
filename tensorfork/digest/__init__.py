"""Digests of tensors: the definition, the sums it is made of, whole models, digests of bytes as they arrive."""
