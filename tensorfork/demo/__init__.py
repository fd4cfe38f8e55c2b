"""What `tensorfork demo` does: fork a real model from one process into another, and show that both compute the same.

`story` starts the processes and tells what happens, `screen` puts it on the terminal, `worker` is what runs in the
processes, `processes` is how they are started and spoken to, and `subjects` are the models.
"""

from tensorfork.demo.failure import DemoFailed
from tensorfork.demo.screen import Screen
from tensorfork.demo.sizes import parse_size
from tensorfork.demo.story import Options, tell

__all__ = ["DemoFailed", "Options", "Screen", "parse_size", "tell"]
