"""What an owner does to a published model, timed."""

import time

import torch

from benchmarks.worker.state import WorkerState


def change(state: WorkerState, *, kind: str) -> float:
    """Do one of `benchmarks.changes.KINDS` to the published model. Returns the seconds that it took."""
    seed = state.seed
    assert seed is not None
    if kind == "look":
        places = seed._service.model.publication.places
        start = time.perf_counter()
        places.check()
        return time.perf_counter() - start
    state.sync()
    replacement = None
    if kind == "replaced":
        module = next(one for one in state.model.modules() if "weight" in one._parameters)
        replacement = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    start = time.perf_counter()
    with seed.updating(values_only=kind == "values only"):
        if replacement is not None:
            module.weight = replacement
    return time.perf_counter() - start
