"""The generation: no fork ever takes a mixture of two."""

import random
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from processes import Child, serve
from seed_leases import SECONDS, model, under_way

import tensorfork
from tensorfork.testing import Fault, FaultyTransport
from tensorfork.testing.faults import Job
from tensorfork.transports.zeromq import ZeroMQ

pytestmark = pytest.mark.slow

# The generation.


def test_the_generation_is_odd_while_the_weights_are_changed_and_another_one_afterwards() -> None:
    with tensorfork.publish(model()) as seed:
        assert seed.generation == 0
        with seed.updating():
            assert seed.generation == 1
        assert seed.generation == 2
        with seed.updating():
            assert seed.generation == 3
        assert seed.generation == 4


def test_a_change_that_fails_leaves_the_generation_odd_until_one_succeeds() -> None:
    with tensorfork.publish(model()) as seed:
        with pytest.raises(RuntimeError, match="broken"), seed.updating():
            raise RuntimeError("broken")
        assert seed.generation % 2 == 1
        with pytest.raises(tensorfork.SeedChanged, match=r"last change .* failed \(RuntimeError: broken\)"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        with pytest.raises(KeyboardInterrupt), seed.updating():
            raise KeyboardInterrupt
        assert seed.generation % 2 == 1
        with seed.updating():
            pass
        assert seed.generation % 2 == 0
        assert tensorfork.fork(seed.address, timeout=SECONDS).keys() == model().keys()


def test_changes_that_overlap_end_when_the_last_of_them_does() -> None:
    with tensorfork.publish(model()) as seed:
        with ExitStack() as second:
            with seed.updating():
                second.enter_context(seed.updating())
                assert seed.generation == 1
            assert seed.generation == 1
        assert seed.generation == 2


def test_an_overlapping_change_that_fails_leaves_the_generation_odd() -> None:
    with tensorfork.publish(model()) as seed:
        with ExitStack() as second:
            with pytest.raises(RuntimeError), seed.updating():  # noqa: PT012  # they overlap
                second.enter_context(seed.updating())
                raise RuntimeError("broken")
            assert seed.generation == 1
        assert seed.generation == 1
        with seed.updating():
            pass
        assert seed.generation == 2


def test_changes_from_many_threads_leave_an_even_generation() -> None:
    with tensorfork.publish(model()) as seed:
        odd: list[bool] = []

        def change() -> None:
            for _ in range(200):
                with seed.updating():
                    odd.append(seed.generation % 2 == 1)

        threads = [threading.Thread(target=change) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(odd)
        assert seed.generation % 2 == 0


def test_a_fork_during_a_change_is_refused() -> None:
    with tensorfork.publish(model()) as seed:
        into = model(7.0)
        with seed.updating(), pytest.raises(tensorfork.SeedChanged):
            tensorfork.fork_into(into, seed.address, timeout=SECONDS)
        assert all(bool((tensor == 7.0).all()) for tensor in into.values())


@pytest.mark.parametrize("verify", [True, False])
def test_a_change_under_the_fork_is_noticed(verify: bool) -> None:
    tensors = model(1.0)
    with tensorfork.publish(tensors) as seed:

        def change() -> None:
            with seed.updating():
                for tensor in tensors.values():
                    tensor.fill_(2.0)

        for into in (model(7.0), {name: tensor.to("meta") for name, tensor in tensors.items()}):
            with pytest.raises(tensorfork.SeedChanged, match="changed during the fork"):
                tensorfork.fork_into(into, seed.address, transport=under_way(change), verify=verify, timeout=SECONDS)
        assert all(tensor.is_meta for tensor in into.values())


@pytest.mark.parametrize("verify", [True, False])
def test_a_change_that_begins_under_the_fork_and_goes_on_is_noticed(verify: bool) -> None:
    with ExitStack() as change, tensorfork.publish(model()) as seed:
        transport = under_way(lambda: change.enter_context(seed.updating()))
        with pytest.raises(tensorfork.SeedChanged):
            tensorfork.fork(seed.address, transport=transport, verify=verify, timeout=SECONDS)


@pytest.mark.parametrize("verify", [True, False])
def test_a_fork_that_may_begin_again_does_so_and_says_how_often(verify: bool) -> None:
    tensors = model(1.0)
    with tensorfork.publish(tensors) as seed:
        left = [2.0, 3.0]

        def change() -> None:
            if left:
                with seed.updating():
                    for tensor in tensors.values():
                        tensor.fill_(left[0])
                left.pop(0)

        into = model(7.0)
        report = tensorfork.fork_into(
            into, seed.address, transport=under_way(change), verify=verify, restarts=5, timeout=SECONDS
        )
        assert (report.restarts, report.generation) == (2, 4)
        assert "2 restarts" in str(report)
        assert all(bool((tensor == 3.0).all()) for tensor in into.values())


def test_a_fork_waits_for_a_change_to_end_when_it_may_begin_again() -> None:
    with tensorfork.publish(model()) as seed:
        with ExitStack() as change:
            change.enter_context(seed.updating())
            timer = threading.Timer(0.3, change.pop_all().close)
            timer.start()
            found = tensorfork.fork(seed.address, restarts=10, timeout=SECONDS)
        timer.join()
        assert found.keys() == model().keys()


def test_a_fork_that_may_begin_again_still_ends_at_its_deadline() -> None:
    with tensorfork.publish(model()) as seed, seed.updating():
        started = time.monotonic()
        with pytest.raises(tensorfork.TensorForkError):
            tensorfork.fork(seed.address, restarts=1_000_000, timeout=0.5)
        assert time.monotonic() - started < 5


# Of one moment.


def mixed(found: dict[str, torch.Tensor]) -> bool:
    """Whether these hold more than one value."""
    first = next(iter(found.values())).flatten()[0]
    return not all(bool((tensor == first).all()) for tensor in found.values())


def many() -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.zeros(30_000) for i in range(30)}  # few enough elements that torch uses one thread


@pytest.mark.parametrize("verify", [True, False])
def test_no_model_is_ever_mixed_while_a_thread_changes_the_weights(verify: bool) -> None:
    tensors, ended = many(), threading.Event()
    with tensorfork.publish(tensors) as seed:

        def change() -> None:
            value, draw = 0.0, random.Random(1)
            while not ended.is_set():
                value += 1.0
                with seed.updating():
                    for tensor in tensors.values():
                        tensor.fill_(value)
                ended.wait(draw.uniform(0.0, 0.3))  # sometimes long enough for a fork

        thread = threading.Thread(target=change)
        thread.start()
        try:
            forks, seen = 0, set()
            into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
            while forks < 15:
                tensorfork.fork_into(into, seed.address, verify=verify, restarts=10_000, timeout=SECONDS)
                assert not mixed(into)
                seen.add(float(into["layer.0"][0]))
                forks += 1
            assert len(seen) > 1, "nothing was changed meanwhile"
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize("verify", [True, False])
def test_no_model_is_ever_mixed_when_every_copy_meets_a_change(verify: bool) -> None:
    """The same, with a change between any two copies in turn."""
    tensors = model(0.0)
    with tensorfork.publish(tensors) as seed:
        value = iter(range(1, 1000))

        def change() -> None:
            with seed.updating():
                new = float(next(value))
                for tensor in tensors.values():
                    tensor.fill_(new)

        for at in range(9):

            class Between(Fault):
                met = False

                def pull(self, job: Job, at: int = at) -> None:
                    job.run(range(min(at, len(job.copies))), job.done)
                    if not self.met:
                        self.met = True
                        change()
                    job.run(range(at, len(job.copies)), job.done)

            transport = FaultyTransport(ZeroMQ(), Between(), piece=20_000)
            with pytest.raises(tensorfork.SeedChanged):
                tensorfork.fork(seed.address, transport=transport, verify=verify, timeout=SECONDS)
            transport = FaultyTransport(ZeroMQ(), Between(), piece=20_000)
            found = tensorfork.fork(seed.address, transport=transport, verify=verify, restarts=3, timeout=SECONDS)
            assert not mixed(found)


@pytest.mark.parametrize("verify", [True, False])
def test_no_model_is_ever_mixed_while_another_process_changes_the_weights(verify: bool) -> None:
    with Child(serve, many) as child:
        address = child.recv()
        for value in range(1, 21):
            child.send("update", float(value))  # goes on while we fork
            found = tensorfork.fork(address, verify=verify, restarts=10_000, timeout=SECONDS)
            assert not mixed(found)
            child.recv()
        found = tensorfork.fork(address, verify=verify, timeout=SECONDS)
        assert float(found["layer.0"][0]) == 20.0
