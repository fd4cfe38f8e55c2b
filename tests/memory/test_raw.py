"""Raw memory as tensors, which may outlive everything else."""

import subprocess
import sys

PROGRAM = """
import sys
import torch
from tensorfork import Region
from tensorfork.memory.raw import region_bytes

memory = torch.arange(64, dtype=torch.uint8)
view = region_bytes(Region(0, memory.data_ptr(), 64, "cpu"))
assert torch.equal(view, memory)
sys.kept = memory, view  # torn down behind every module
"""


def test_a_view_that_is_left_when_python_ends_does_not_crash_the_process() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
