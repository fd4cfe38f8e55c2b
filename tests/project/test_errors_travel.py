"""Errors and reports are carried between processes by pickle (multiprocessing, Ray) and arrive as they were."""

import copy
import pickle
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

import tensorfork
from tensorfork.wire import messages

SURROUNDINGS = tensorfork.Identity(model="llama", kernels={"attention": "flashinfer"}, tags={"lora": "none"})
EXAMPLES: dict[type[Exception], Callable[[], Exception]] = {
    tensorfork.IdentityMismatch: lambda: tensorfork.IdentityMismatch(
        "tcp://10.0.0.7:4180", {"rank": (None, tensorfork.Rank(tp=(1, 2))), "identity": (SURROUNDINGS, None)}
    ),
    tensorfork.LayoutMismatch: lambda: tensorfork.LayoutMismatch(
        missing=["a", "w"],
        unexpected=["b", "c", "module.w"],
        mismatched=[("d", "dtype")],
        left_out={"a"},
        renamed={"w": "module.w"},
        advice="module.",
    ),
    tensorfork.ValueMismatch: lambda: tensorfork.ValueMismatch("another eps", names=["norm.eps"]),
    tensorfork.TransferFailed: lambda: tensorfork.TransferFailed("stopped", complete=["a"], undrained=[(4096, 8)]),
    tensorfork.ForkCancelled: lambda: tensorfork.ForkCancelled("stopped", complete=["a"], undrained=[(4096, 8)]),
    tensorfork.VerificationFailed: lambda: tensorfork.VerificationFailed(
        "wrong", tensors=["a", "b"], ranges={"b": ((0, 7),)}
    ),
    tensorfork.SeedMoved: lambda: tensorfork.SeedMoved("moved", tensors=["a"]),
    tensorfork.MemoryInUse: lambda: tensorfork.MemoryInUse("in use", users=["a fork"]),
    tensorfork.ResourceExhausted: lambda: tensorfork.ResourceExhausted("no more", resource="threads"),
    messages.Malformed: lambda: messages.Malformed("half a message", 7),
    messages.OtherVersion: lambda: messages.OtherVersion(3, 9),
}
"""One of each kind that takes more than a message. A kind that is not here is made of a message alone."""


def every_kind() -> list[type[Exception]]:
    for module in pkgutil.walk_packages(tensorfork.__path__, "tensorfork."):
        if module.name.split(".")[1] not in ("cli", "demo", "testing"):
            import_module(module.name)
    found: list[type[Exception]] = [tensorfork.TensorForkError]
    for kind in found:
        found += [one for one in kind.__subclasses__() if one.__module__.startswith("tensorfork.") and one not in found]
    return found


def carried(value: Any) -> list[Any]:
    """What arrives by every protocol of pickle, and what the two kinds of copies are."""
    by_pickle = [pickle.loads(pickle.dumps(value, number)) for number in range(pickle.HIGHEST_PROTOCOL + 1)]
    return [*by_pickle, copy.copy(value), copy.deepcopy(value)]


def example_of(kind: type[Exception]) -> Exception:
    return EXAMPLES.get(kind, lambda: kind("what happened"))()


@pytest.mark.parametrize("kind", every_kind(), ids=lambda kind: kind.__name__)
def test_an_error_of_every_kind_arrives_as_it_was(kind: type[Exception]) -> None:
    error = example_of(kind)
    error.add_note("on node 7")
    for arrived in carried(error):
        assert arrived is not error
        assert type(arrived) is kind
        assert str(arrived) == str(error) != ""
        assert arrived.args == error.args
        assert vars(arrived) == vars(error)
        assert arrived.__notes__ == ["on node 7"]


def test_the_examples_have_every_attribute_that_an_error_documents() -> None:
    """So that none of them is compared as what it is by default."""
    for kind in every_kind():
        for name, value in vars(example_of(kind)).items():
            assert value, f"{kind.__name__}.{name}"


VERSION = tensorfork.Version("0a1b", 3, "step-3", "ff00")
VALUES = tensorfork.ValueReport(9, (tensorfork.DifferentValues("eps", ("norm.eps",), "1e-05", "1e-06"),), 2, ("a",))
REPORT = tensorfork.ForkReport(
    "tcp://10.0.0.7:4180", "zeromq", "tcp", 3, 12, 4, {"transfer": 0.5}, True, 1, {"nccl": "no GPU"}, version=VERSION,
    values=VALUES, trace="4bf92f3577b34da6a3ce929d0e0e4736",
)  # fmt: skip
POLICY = tensorfork.ValuePolicy("strict", expected="*.rank", take=["*.k_scale_float"])
STATS = tensorfork.SeedStats(1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "value",
    [SURROUNDINGS, tensorfork.Identity(), tensorfork.Rank(tp=(1, 2)), VERSION, REPORT, POLICY, STATS],
    ids=lambda value: type(value).__name__,
)
def test_what_is_returned_arrives_as_it_was(value: Any) -> None:
    for arrived in carried(value):
        assert type(arrived) is type(value)
        assert arrived == value
        assert repr(arrived) == repr(value)


def test_a_policy_that_arrived_says_the_same() -> None:
    for arrived in carried(POLICY):
        assert [arrived.expects(name) for name in ("a.rank", "a.training", "a.eps")] == [True, True, False]
        assert [arrived.takes(name) for name in ("a.k_scale_float", "a.eps")] == [True, False]
    for arrived in carried(tensorfork.ValuePolicy()):
        assert not arrived.takes("a.eps")


def test_an_identity_that_arrived_cannot_be_changed_either() -> None:
    (*_, arrived) = carried(SURROUNDINGS)
    with pytest.raises(TypeError):
        arrived.tags["lora"] = "some"
