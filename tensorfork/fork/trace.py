"""A fork's trace id: 16 bytes that its lease carries to the seed.

The logs of both sides, its report and its errors name it, so that one fork can be followed through all of them.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensorfork.errors import TensorForkError

log = logging.getLogger("tensorfork")

NBYTES = 16
_TRACE_ID = re.compile(r"[0-9a-f]{32}")


def trace_id(given: Any) -> str:
    """The trace id that a caller gives, as in a `traceparent` of W3C Trace Context; None makes a random one.

    Raises `TypeError` and `ValueError`.
    """
    if given is None:
        return os.urandom(NBYTES).hex()
    if not isinstance(given, str):
        raise TypeError(f"trace must be a trace id as text, not {type(given).__name__}")
    if not _TRACE_ID.fullmatch(given) or given == "0" * 32:
        raise ValueError(f"trace must be 32 lower-case hexadecimal digits, not all 0, and not {given[:80]!r}")
    return given


@contextmanager
def traced(trace: str, what: str, peer: str) -> Iterator[None]:
    """Inside, something is asked of a peer under a trace id: its beginning and its failure are logged, and errors have
    the id as `trace` and in a note.
    """
    log.info("%s from %s begins (trace %s)", what, peer, trace)
    try:
        yield
    except TensorForkError as error:
        error.trace = trace
        error.add_note(f"Its trace id is {trace}; the seed's log has it with each lease")
        log.info("%s from %s failed (trace %s): %s", what, peer, trace, error)
        raise
