"""The modes of torch that a caller's thread may be in, and how our own work is kept out of them.

Under some of them a new tensor has no memory of its own (`FakeTensorMode`, functionalization), lies on another device
(`torch.device`, `torch.set_default_device`), or is no ordinary tensor (`torch.inference_mode`); others run code of the
caller's at each operation. They belong to threads: a thread that we start is in none of them. So there is one edge:
what is public does its work `in_normal_mode`, on the caller's thread, and his modes are there again when it ends.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar

import torch
import torch.overrides
from torch._C._dynamo import eval_frame
from torch.utils import _python_dispatch

from tensorfork.errors import UnsupportedTensor
from tensorfork.interpreter import ending

P = ParamSpec("P")
R = TypeVar("R")

_FUNCTIONALIZE = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)


def in_normal_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function inside `NormalMode`, and not traced: a function that torch compiles is interrupted by it.

    The process does not end while it is inside torch (`interpreter.ending`).

    The function's argument `progress`, if it has one, is the caller's, and is called in his modes.
    `torch.compiler.disable` would keep it from being traced, and import torch's compiler, which takes a second.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        compiling = eval_frame.set_eval_frame(None)
        try:
            with ending.guarded(), NormalMode() as mode:
                progress: Any = kwargs.get("progress")
                if callable(progress):
                    kwargs["progress"] = mode.outside(progress)
                return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(compiling)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run


class NormalMode:
    """Whatever mode the caller is in, tensors made inside are ordinary ones, and autograd does not record.

    Modes of the process, such as the default dtype, stay as they are. Entering it raises `RuntimeError` while a CUDA
    graph is captured on the current stream: what is done there would not happen now.
    """

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            _leave_modes(stack)
            self._restore = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    def outside(self, callback: Callable[P, R]) -> Callable[P, R]:
        """A function that calls this one in the caller's modes."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            self._restore.close()
            try:
                return callback(*args, **kwargs)
            finally:
                self.__enter__()

        return call


def _leave_modes(stack: ExitStack) -> None:
    """Leave all modes of this thread; the stack enters them again."""
    for _ in range(torch._C._len_torch_function_stack()):
        stack.enter_context(torch.overrides._pop_mode_temporarily())
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured on the current stream; publish, update or fork a model before or after"
        )
    for _ in range(torch._C._len_torch_dispatch_stack()):
        stack.enter_context(_python_dispatch._pop_mode_temporarily())
    if torch._C._functorch.peek_interpreter_stack() is not None:  # of torch.func.vmap, grad, functionalize
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

        stack.enter_context(temporarily_clear_interpreter_stack())
    stack.enter_context(torch._C._ExcludeDispatchKeyGuard(_FUNCTIONALIZE))
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())


def check_ordinary(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `UnsupportedTensor` for a tensor that stands for another one while a function of torch's transforms code.

    Such a tensor is of the class `torch.Tensor`, and has no memory: to ask for its address may end the process.
    """
    for is_wrapped, where in _WRAPPED:
        if any(map(is_wrapped, tensors.values())):
            name = next(name for name, tensor in tensors.items() if is_wrapped(tensor))
            raise UnsupportedTensor(f"{name}: a tensor inside {where} {STANDS_FOR_ANOTHER}")


STANDS_FOR_ANOTHER = (
    "has no memory, and stands for another tensor while torch traces or transforms code. Publish and fork outside of "
    "that, with the model's own tensors"
)
_WRAPPED = (
    (torch._is_functional_tensor, "functionalization"),
    (torch._C._functorch.is_functorch_wrapped_tensor, "a function of torch.func (vmap, grad, jvp)"),
)
