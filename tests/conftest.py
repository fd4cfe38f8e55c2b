"""What every test stands on: nothing is left behind, a hang is loud, and two runs do the same.

* `no_process_left` and `nothing_left_at_the_end` fail a test, or the run, that leaves child processes or
  non-daemon threads behind.
* A test past its timeout ends the run at once, with the stacks of every thread here and in its children.
* `@pytest.mark.gpu(2)` skips, and says why, where there are fewer than two CUDA devices.
* Hypothesis draws the same examples every time, and never judges by the clock.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import psutil
import pytest
from missing_libraries import line_about

SETTLE = 5.0
"""Seconds that processes and threads get to end by themselves once their test is over."""

os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # so that children print their stacks when they are aborted

hypothesis.settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,  # that one looks at the clock too
        hypothesis.HealthCheck.data_too_large,  # and this one depends on the constants in the sources
    ],
)
hypothesis.settings.load_profile("deterministic")


# Nothing is left behind.


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail a test that leaves child processes or non-daemon threads which were not there before it."""
    processes, threads = set(_children()), set(threading.enumerate())
    yield
    _fail_on_leftovers(processes, threads)


@pytest.fixture(autouse=True, scope="session")
def nothing_left_at_the_end() -> Iterator[None]:
    """The same for fixtures that outlive a test."""
    processes, threads = set(_children()), set(threading.enumerate())
    yield
    _fail_on_leftovers(processes, threads)


def _fail_on_leftovers(processes: set[psutil.Process], threads: set[threading.Thread]) -> None:
    def left_processes() -> list[psutil.Process]:
        multiprocessing.active_children()  # waits for those of multiprocessing's that are done
        return [child for child in _children() if child not in processes]

    def left_threads() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in threads and not t.daemon]

    _wait_until(lambda: not left_processes() and not left_threads(), SETTLE)
    complaints = [f"process {_describe(child)}" for child in left_processes()]
    complaints += [f"non-daemon thread {t.name!r}" for t in left_threads()]
    for child in left_processes():
        _end(child)  # the next test is not to pay for this one
    if complaints:
        pytest.fail("left behind: " + "; ".join(complaints), pytrace=False)


def _children() -> list[psutil.Process]:
    """Every living descendant, and every dead one nobody waited for, but for Python's own helpers."""
    return [child for child in psutil.Process().children(recursive=True) if not _is_helper(child)]


def _is_helper(process: psutil.Process) -> bool:
    """Whether it is the process that cleans up for multiprocessing, or the one (not its children) that forks for it."""
    try:
        words = " ".join(process.cmdline())
        return "multiprocessing.resource_tracker" in words or (
            "multiprocessing.forkserver" in words and process.ppid() == os.getpid()
        )
    except psutil.Error:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline()) or process.name()
        return f"{process.pid} ({process.status()}): {command[:200]}"
    except psutil.Error:
        return f"{process.pid}"


def _end(process: psutil.Process) -> None:
    try:
        process.kill()
        process.wait(SETTLE)
    except (psutil.Error, psutil.TimeoutExpired):
        pass  # gone already, or beyond what a test run can end


def _wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)


# A hang is a loud failure. pytest-timeout's own thread method prints this process's stacks alone and leaves
# the children running, where the cause of a hang between two processes often is.

TERMINAL = pytest.StashKey[int]()
LAST_LINE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TERMINAL] = os.dup(2)  # nothing is being captured yet
    faulthandler.register(signal.SIGUSR1, config.stash[TERMINAL], all_threads=True)
    # A shell that starts us in the background has us ignore interrupts, and our children too, whatever they test.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.unregister(signal.SIGUSR1)
    if line := config.stash.get(LAST_LINE, ""):
        os.write(config.stash[TERMINAL], f"{line}\n".encode())
    os.close(config.stash[TERMINAL])


def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    timer = threading.Timer(settings.timeout, _give_up, (item, settings.timeout))
    timer.name = f"timeout of {item.nodeid}"
    timer.daemon = True
    timer.start()

    def cancel() -> None:
        timer.cancel()
        timer.join()

    item.cancel_timeout = cancel  # type: ignore[attr-defined]  # called by pytest-timeout
    return True


def _give_up(item: pytest.Item, seconds: float) -> None:
    """Print the stacks of all threads of this process and its children, end the children, and exit."""
    terminal = item.config.stash[TERMINAL]

    def say(text: str) -> None:
        os.write(terminal, f"{text}\n".encode())

    say(f"\n+++ Timeout: {item.nodeid} took more than {seconds:g} s")
    for thread in threading.enumerate():
        say(f"    thread {thread.ident:#018x} is {thread.name!r}")
    faulthandler.dump_traceback(terminal, all_threads=True)

    children = _children()
    for child in children:
        say(f"    child {_describe(child)}")
        _signal(child, signal.SIGABRT)  # faulthandler prints all its threads, and it ends
        _signal(child, signal.SIGCONT)  # in case it was stopped
    psutil.wait_procs(children, timeout=2.0)
    for child in children:
        _signal(child, signal.SIGKILL)

    # The test may come to its end because its children did. What they printed is then in its report.
    time.sleep(0.5)
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture.is_globally_capturing():
        item.add_report_section("call", "stdout", "\n".join(capture.read_global_capture()))
    for _, key, text in item._report_sections:
        if text.strip():
            say(f"--- captured {key} ---\n{text}")
    say(f"+++ The run ends here: {item.nodeid} took more than {seconds:g} s")
    os._exit(1)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        pass  # it has ended


# Where there are no GPUs.


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    import torch

    wanted = marker.kwargs.get("count", marker.args[0] if marker.args else 1)
    if not torch.cuda.is_available():
        pytest.skip(f"needs {wanted} CUDA device{'s'[: wanted != 1]}; torch finds none")
    if torch.cuda.device_count() < wanted:
        pytest.skip(f"needs {wanted} CUDA devices; there are {torch.cuda.device_count()}")


# What is missing of the system.


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Keep for the very last line how many tests were skipped for want of libraries, and what changes that."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    config.stash[LAST_LINE] = line_about(reasons)
