"""What a background task leaves behind when it fails."""

import gc
import weakref

import pytest

from tensorfork.transports.process_group.tasks import BackgroundTask


class Held:
    """Stands for a group, which has a thread and descriptors."""


def test_what_a_failed_task_held_is_released_without_garbage_collection() -> None:
    seen: list[weakref.ref[Held]] = []

    def fail() -> None:
        held = Held()
        seen.append(weakref.ref(held))
        raise RuntimeError("no group")

    gc.disable()
    try:
        task = BackgroundTask(fail, lambda _: None, "test")
        with pytest.raises(RuntimeError, match="no group") as caught:
            task.result(lambda: None)
        assert seen[0]() is None, caught.value  # which is there still
    finally:
        gc.enable()
