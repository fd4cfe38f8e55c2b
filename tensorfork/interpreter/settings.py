"""The one switch that forbids every process-wide setting of this library."""

import os

_allowed = os.environ.get("TENSORFORK_PROCESS_SETTINGS", "1") != "0"


def allow_process_settings(allowed: bool) -> None:
    """Say whether this library may change settings that act on the whole process; it may, by default.

    docs/process_settings.md lists them: Python's garbage collector and switch interval, OpenMP's threads, the C
    library's allocator, environment variables while NCCL's and Mooncake's objects are constructed.

    Where they are forbidden, publishing and forking are slower, and transports that cannot start without one
    (`nccl`, `transfer_engine`, and `gloo` under ``TORCH_GLOO_LAZY_INIT=1``) are unavailable; they name the variables
    as their reason. A variable that has the needed value already is not changed, so nothing stands against it: a
    deployment that sets them itself can forbid all changes and keep its transports.

    Call it before the first `publish` or `fork_into`. What has begun meanwhile ends as it began. The environment
    variable ``TENSORFORK_PROCESS_SETTINGS=0`` says the same from the start, before `import tensorfork`.
    """
    global _allowed
    _allowed = bool(allowed)


def process_settings_allowed() -> bool:
    """Whether process-wide settings may be changed."""
    return _allowed
