"""The end of a process while threads of ours are inside torch: they have left it by then."""

import subprocess
import sys
import textwrap
import threading

import pytest

from tensorfork.interpreter import ending

SECONDS = 60.0


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> ending._Ending:
    """In place of the process's own."""
    monkeypatch.setattr(ending, "_ending", ending._Ending())
    return ending._ending


def test_exit_stops_what_runs_and_waits_for_it_before_what_comes_last(another: ending._Ending) -> None:
    happened: list[str] = []
    entered, stop = threading.Event(), threading.Event()

    def work() -> None:
        with ending.guarded(stop.set):
            entered.set()
            assert stop.wait(SECONDS)
            happened.append("stopped")

    ending.at_exit(lambda until: happened.append("closed"))
    ending.after_exit(lambda: happened.append("last"))
    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(SECONDS)
    ending._end()
    thread.join(SECONDS)
    assert set(happened) == {"stopped", "closed", "last"}
    assert happened[-1] == "last"


def test_nothing_begins_on_another_thread_once_the_process_ends_and_its_own_may_go_on(another: ending._Ending) -> None:
    ending._end()
    with ending.guarded():
        ending.check()
    raised: list[BaseException] = []

    def late() -> None:
        try:
            with ending.guarded():
                raised.append(AssertionError("it began"))
        except SystemExit as error:
            raised.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    thread.join(SECONDS)
    assert [type(one) for one in raised] == [SystemExit]


def test_what_does_not_stop_costs_the_exit_a_bounded_time(
    another: ending._Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "EXIT_TIMEOUT", 0.05)
    entered, released = threading.Event(), threading.Event()

    def stuck() -> None:
        with ending.guarded():
            entered.set()
            released.wait(SECONDS)

    thread = threading.Thread(target=stuck)
    thread.start()
    assert entered.wait(SECONDS)
    ending._end()
    assert thread.is_alive()
    released.set()
    thread.join(SECONDS)


HEAD = """
import sys, threading, torch, tensorfork
from tensorfork.digest import torch_digests
from tensorfork.model import snapshot
model = {"long": torch.zeros(200 << 20), **{f"w{i}": torch.zeros(1 << 18) for i in range(20)}}
under_way = threading.Event()

def announced(function):
    def call(*args, **kwargs):
        under_way.set()
        return function(*args, **kwargs)
    return call

torch_digests._compute = announced(torch_digests._compute)
snapshot._fill = announced(snapshot._fill)

def aside(function, *args, **kwargs):
    threading.Thread(target=function, args=args, kwargs=kwargs, daemon=True).start()
"""
PROGRAMS = {
    "digests of a seed": "seed = tensorfork.publish(model); aside(seed.digests)",
    "digests of a model": "aside(tensorfork.digests, model)",
    "a snapshot": "aside(tensorfork.publish, model, snapshot=True)",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", PROGRAMS)
def test_a_process_ends_in_the_middle_of_it(what: str) -> None:
    """Before, it aborted: `terminate called without an active exception`."""
    program = HEAD + PROGRAMS[what] + "\nassert under_way.wait(60)\nprint('ending', flush=True)\n"
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ending\n", "")
