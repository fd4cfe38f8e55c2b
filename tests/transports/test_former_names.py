"""Documented import paths go on working."""

from tensorfork.transports import nccl, process_group


def test_nccl_and_gloo_are_found_where_they_were() -> None:
    assert nccl.NCCL is process_group.NCCL
    assert nccl.Gloo is process_group.Gloo
