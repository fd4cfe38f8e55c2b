"""Whatever mode of torch the caller's thread is in, seeds and forks do what they do without, or refuse first."""

import contextlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from processes import Child
from torch import nn
from torch_modes import MODES
from whole_forks import to_meta

import tensorfork
from tensorfork.model.modes import NormalMode, in_normal_mode
from tensorfork.transports import registry

pytestmark = pytest.mark.slow

SECONDS = 60.0


def source() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.rand(64, 32, generator=generator),
        "few runs": torch.rand(8, 32, generator=generator)[:, :16],
        "many runs": torch.rand(1000, 32, generator=generator)[:, ::2],
    }


def differences(model: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in source().items() if not torch.equal(model[name], tensor)]


def emptied() -> dict[str, torch.Tensor]:
    model = source()
    for tensor in model.values():
        tensor.zero_()
    return model


def fork_under(mode: Callable[[], Any], transport: str) -> list[str]:
    """Fork in every way while the mode is on, and return the names that are not as in the seed."""
    in_place, meta = emptied(), to_meta(emptied())
    with tensorfork.publish(source(), transports=[transport]) as seed:
        with mode():
            tensorfork.fork_into(in_place, seed.address, transport=transport, timeout=SECONDS)
            tensorfork.fork_into(meta, seed.address, transport=transport, timeout=SECONDS)
            copied = tensorfork.fork(seed.address, transport=transport, timeout=SECONDS)
        names = [name for model in (in_place, meta, copied) for name in differences(model)]
        ordinary = all(type(tensor) is torch.Tensor and not tensor.is_inference() for tensor in copied.values())
    return names if ordinary else [*names, "extraordinary tensors"]


def publish_under(mode: Callable[[], Any], transport: str) -> list[str]:
    """Publish, update and wake while the mode is on; fork without it, and return the names that differ."""
    model, names = source(), []
    more = torch.ones(3)
    for snapshot in (False, True):
        with mode():
            seed = tensorfork.publish(model, transports=[transport], snapshot=snapshot)
            if not snapshot:
                with seed.updating():
                    model["more"] = more
                seed.suspend()
                seed.resume()
                with seed.updating():
                    del model["more"]
        with seed:
            copied = tensorfork.fork(seed.address, transport=transport, timeout=SECONDS)
        names += [*differences(copied), *(copied.keys() - model.keys())]
    return names


MAY_END_THE_PROCESS = ["FakeTensorMode", "FunctionalTensorMode", "functionalization"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in MAY_END_THE_PROCESS])
def test_under_any_mode_every_tensor_has_the_seed_s_bytes(mode: str) -> None:
    assert fork_under(MODES[mode], "zeromq") == []
    assert fork_under(MODES[mode], "gloo") == []
    assert publish_under(MODES[mode], "zeromq") == []


def transports() -> Iterator[str]:
    yield from ("zeromq", "gloo")
    with contextlib.suppress(tensorfork.TransportUnavailable):
        registry.load("transfer_engine:tcp").facts([])
        yield "transfer_engine:tcp"


def work_under(pipe: Connection, mode: str) -> None:
    for transport in transports():
        pipe.send((transport, fork_under(MODES[mode], transport), publish_under(MODES[mode], transport)))
    pipe.send(None)


@pytest.mark.parametrize("mode", MAY_END_THE_PROCESS)
def test_under_a_mode_without_memory_every_tensor_has_the_seed_s_bytes(mode: str) -> None:
    with Child(work_under, mode) as child:
        done = list(iter(child.recv, None))
    assert [(names, more) for _, names, more in done] == [([], [])] * len(done)
    assert [transport for transport, _, _ in done][:2] == ["zeromq", "gloo"]


def fork_into_inside(pipe: Connection, transform: str) -> None:
    """Fork into a model of its own inside a function of `torch.func`, and try to with that function's own tensors."""
    model, refused = emptied(), []
    with tensorfork.publish(source()) as seed:

        def inside(x: torch.Tensor) -> torch.Tensor:
            tensorfork.fork_into(model, seed.address, timeout=SECONDS)
            for call in (lambda: tensorfork.publish({"x": x}), lambda: tensorfork.fork_into({"x": x}, seed.address)):
                try:
                    call()
                except tensorfork.UnsupportedTensor as error:
                    refused.append(str(error))
            return (x * 2).sum()

        result = getattr(torch.func, transform)(inside)(torch.ones(3))
    pipe.send((differences(model), refused, result.shape, isinstance(result, torch.Tensor)))


@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize"])
def test_inside_a_transform_a_model_is_filled_and_the_transform_s_tensors_are_refused(transform: str) -> None:
    with Child(fork_into_inside, transform) as child:
        names, refused, shape, _ = child.recv()
    assert names == []
    assert ["x: a tensor inside" in one and "has no memory" in one for one in refused] == [True, True]
    assert shape == ((3,) if transform in ("vmap", "grad") else ())


def refusals_of_fakes(pipe: Connection) -> None:
    from torch._subclasses import FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FakeTensorMode() as mode:
        models: dict[str, Any] = {"a module": nn.Linear(2, 2)}
        with torch.device("meta"):
            models["a module on the meta device"] = nn.Linear(2, 2)
    models["in a mapping"] = {"weight": mode.from_tensor(torch.ones(2, 2)), "bias": torch.ones(2)}
    with FunctionalTensorMode():
        models["functional"] = {"weight": FunctionalTensor.to_functional(torch.ones(2, 2)), "bias": torch.ones(2)}
    torch._enable_functionalization(reapply_views=True)
    models["functional, and of torch's plain class"] = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    torch._disable_functionalization()
    for name, model in models.items():
        # nobody listens there: the model is refused before anybody is asked
        for call in (
            lambda m=model: tensorfork.publish(m),
            lambda m=model: tensorfork.fork_into(m, "tcp://127.0.0.1:1"),
        ):
            try:
                call()
                pipe.send((name, "nothing was raised"))
            except tensorfork.UnsupportedTensor as error:
                pipe.send((name, str(error)))
    pipe.send(None)


def test_models_of_tensors_without_memory_are_refused_before_anything_happens() -> None:
    with Child(refusals_of_fakes) as child:
        refused = list(iter(child.recv, None))
    assert len(refused) == 10
    for name, message in refused:
        assert message.startswith("weight: a "), name
        assert "stands for another tensor while torch traces" in message, name


def compiled(pipe: Connection) -> None:
    model, updated = emptied(), source()
    seed = tensorfork.publish(updated)

    def publish(x: torch.Tensor) -> torch.Tensor:
        with tensorfork.publish(model), seed.updating():
            y = x + 1
        return y * 1

    def fork_into(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        tensorfork.fork_into(model, seed.address, timeout=SECONDS)
        return y + model["w"].sum()

    with seed:
        compile_ = torch.compile(backend="eager")
        pipe.send(torch.equal(compile_(publish)(torch.ones(2)), torch.full((2,), 2.0)))
        pipe.send(torch.allclose(compile_(fork_into)(torch.ones(2)), 2 + source()["w"].sum()))
        pipe.send(differences(model))
        try:
            torch.compile(fork_into, backend="eager", fullgraph=True)(torch.ones(3))
        except Exception as error:
            pipe.send(str(error))


def test_inside_compiled_code_nothing_of_ours_is_traced() -> None:
    with Child(compiled) as child:
        assert child.recv() is True
        assert child.recv() is True
        assert child.recv() == []
        assert "Skip inlining" in child.recv()  # with fullgraph=True, before anything happens


@pytest.mark.parametrize("mode", MODES)
def test_the_caller_s_mode_is_there_again_afterwards(mode: str) -> None:
    def state() -> Any:
        return (
            torch.overrides._get_current_function_mode_stack(),
            torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Functionalize),
        )

    with MODES[mode]():
        before = state()
        with NormalMode():
            inside = torch.ones(2, device="cpu")
            assert state() == ([], [], False, False, True)
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            in_normal_mode(lambda: 1 / 0)()
        assert state() == before
    assert inside.tolist() == [1.0, 1.0]
    assert type(inside) is torch.Tensor


def test_during_a_capture_everything_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorfork.publish(source()) as seed:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for call in (
            lambda: tensorfork.publish(source()),
            lambda: tensorfork.fork_into(emptied(), seed.address),
            lambda: tensorfork.fork(seed.address),
            seed.rescan,
        ):
            with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
                call()
        assert seed.generation == 0


def test_progress_is_called_in_the_caller_s_mode() -> None:
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((torch.empty(1).device.type, torch.is_inference_mode_enabled()))

    with tensorfork.publish(source()) as seed, torch.inference_mode(), torch.device("meta"):
        copied = tensorfork.fork(seed.address, timeout=SECONDS, progress=progress)
    assert set(seen) == {("meta", True)}
    assert differences(copied) == []
