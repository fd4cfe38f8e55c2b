"""Environment variables, changed while an object of torch's or Mooncake's is constructed.

Why: both read settings from the environment alone. Without them torch's watchdog ends the seed's process when a fork is
killed, and Mooncake takes TCP where RDMA or NVLink was asked for.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tensorfork.errors import TransportUnavailable
from tensorfork.interpreter.settings import process_settings_allowed

Changes = Mapping[str, str | None]
"""Values by name; None for a variable that must not be set."""

_NONE: Changes = {}
_lock = threading.RLock()


def forbidden_changes(changes: Changes) -> str | None:
    """Why these changes cannot be made, with the remedy; None where they can, or where nothing is to be changed."""
    if process_settings_allowed() or not (needed := _different(changes)):
        return None
    wanted = ", ".join(f"{name}={value}" if value is not None else f"no {name}" for name, value in needed.items())
    return (
        f"it needs another environment while it starts ({wanted}), and process-wide settings are forbidden here; start "
        "the process with that environment, or call tensorfork.allow_process_settings(True)"
    )


@contextmanager
def environment(needed: Changes, preferred: Changes = _NONE) -> Iterator[None]:
    """Inside, the process's environment has these values; afterwards it is as it was.

    One thread at a time, which may nest. Keep it short: other code of the process sees the values too.

    Where process-wide settings are forbidden, what is `preferred` is left out, and `TransportUnavailable` is raised if
    anything `needed` is to be changed. Where nothing is needed or preferred, nothing is waited for.
    """
    if not needed and not preferred:
        yield
        return
    with _lock:
        if why_not := forbidden_changes(needed):
            raise TransportUnavailable(why_not)
        changed = _different({**needed, **preferred} if process_settings_allowed() else needed)
        before = {name: os.environ.get(name) for name in changed}
        try:
            _set(changed)
            yield
        finally:
            _set(before)


def _different(changes: Changes) -> dict[str, str | None]:
    return {name: value for name, value in changes.items() if os.environ.get(name) != value}


def _set(changes: Changes) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _after_fork() -> None:
    """In the child, the thread that held the lock may not exist."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
