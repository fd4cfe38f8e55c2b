"""What `tensorfork demo` does: fork a real model from one process into another, and show that both compute the same.

`steps` starts the processes and runs the demo step by step, `screen` prints what happens, `worker` runs in the
processes, `processes` starts them and calls them, and `models`, `hugging_face` and `generated` are the models.
"""

from tensorfork.demo.failure import DemoFailed
from tensorfork.demo.screen import Screen
from tensorfork.demo.sizes import parse_size
from tensorfork.demo.steps import Options, run

__all__ = ["DemoFailed", "Options", "Screen", "parse_size", "run"]
