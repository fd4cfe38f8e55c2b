"""What the last line of a test run says where system libraries are missing."""

import os
import re
from collections.abc import Sequence


def line_about(reasons: Sequence[str]) -> str:
    """The line for these reasons of skipped tests; empty where nothing is missing."""
    missing = [reason for reason in reasons if "needs Mooncake" in reason]
    if not missing:
        return ""
    found = re.search(r"apt-get install [\w -]+|pip (?:un)?install .*", missing[0])
    command = found[0].strip() if found else missing[0]
    if command.startswith("apt-get") and os.getuid() != 0:
        command = f"sudo {command}"
    return f"{len(missing)} tests were skipped because Mooncake cannot be used here. To run them: {command}"
