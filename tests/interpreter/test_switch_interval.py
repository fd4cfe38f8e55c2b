"""How our threads share the interpreter with others."""

import sys
import threading

import pytest

from tensorfork.interpreter.switch_interval import SECONDS, short_switch_interval


def test_turns_are_short_inside_and_as_before_behind_whoever_leaves_first() -> None:
    usual = sys.getswitchinterval()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with short_switch_interval:
            inside.set()
            assert leave.wait(20)

    thread = threading.Thread(target=other)
    with short_switch_interval:
        thread.start()
        assert inside.wait(20)
    assert sys.getswitchinterval() == pytest.approx(SECONDS, rel=0.05)
    leave.set()
    thread.join(20)
    assert sys.getswitchinterval() == usual


def test_turns_are_as_before_in_a_child_that_is_forked_off_meanwhile() -> None:
    usual = sys.getswitchinterval()
    turns = type(short_switch_interval)()
    with turns:
        assert sys.getswitchinterval() < usual
        turns.after_fork()  # as os.fork() calls it there
        assert sys.getswitchinterval() == usual
        with turns:
            assert sys.getswitchinterval() < usual
        assert sys.getswitchinterval() == usual
        turns._inside = 1  # here it was the parent's own, after all
    assert sys.getswitchinterval() == usual


def test_turns_are_as_before_after_a_failure_and_never_longer_than_they_were() -> None:
    usual = sys.getswitchinterval()
    try:
        sys.setswitchinterval(SECONDS / 10)
        before = sys.getswitchinterval()
        inside: list[float] = []

        def fail() -> None:
            with short_switch_interval:
                inside.append(sys.getswitchinterval())
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert inside == [before]
        assert sys.getswitchinterval() == before
    finally:
        sys.setswitchinterval(usual)
