"""`NCCL` and `Gloo` under their first documented path; they live in `tensorfork.transports.process_group`."""

from tensorfork.transports.process_group import NCCL, Gloo

__all__ = ["NCCL", "Gloo"]
