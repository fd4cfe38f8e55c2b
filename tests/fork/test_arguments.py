"""Arguments are right, or an error that says what to do, before the model is walked and the peer is asked."""

import socket
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from math import inf, nan
from typing import Any

import pytest
import torch

import tensorfork
from tensorfork.validators import DAY

SECONDS = 20.0
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


class Untouchable(dict[str, torch.Tensor]):
    """A model that must not be walked."""

    def items(self) -> Any:
        raise AssertionError("the model is walked")

    def __iter__(self) -> Any:
        raise AssertionError("the model is walked")


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody may be asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.0)
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(BlockingIOError):
            listener.accept()


WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("timeout", 0, ValueError, r"timeout is in seconds; it must be more than 0, and at most 86,400 \(a day\), not 0"),
    ("timeout", 0.0, ValueError, "more than 0"),
    ("timeout", -1, ValueError, "more than 0"),
    ("timeout", nan, ValueError, "more than 0"),
    ("timeout", inf, ValueError, "at most 86,400"),
    ("timeout", -inf, ValueError, "more than 0"),
    ("timeout", DAY + 1, ValueError, "at most 86,400"),
    ("timeout", 10**400, ValueError, "at most 86,400"),
    ("wait", -(10**400), ValueError, "at least 0"),
    ("timeout", "60", TypeError, "timeout must be a number of seconds, not str"),
    ("timeout", None, TypeError, "not NoneType"),
    ("timeout", True, TypeError, "not bool"),
    ("timeout", 1j, TypeError, "not complex"),
    ("wait", -0.1, ValueError, "wait is in seconds; it must be at least 0, not -0.1"),
    ("wait", nan, ValueError, "at least 0"),
    ("wait", "1", TypeError, "wait must be a number"),
    ("wait", True, TypeError, "not bool"),
    ("restarts", -1, ValueError, "restarts must be at least 0, not -1"),
    ("restarts", 1.0, TypeError, "restarts must be an integer, not float"),
    ("restarts", inf, TypeError, "not float"),
    ("restarts", "1", TypeError, "not str"),
    ("restarts", True, TypeError, "not bool"),
    ("device", "nonsense", ValueError, "device='nonsense' is no device; write 'cpu', 'cuda' or 'cuda:0'"),
    ("device", "", ValueError, "is no device"),
    ("device", "cuda:-1", ValueError, "is no device"),
    ("device", "meta", ValueError, "has no memory to fork into"),
    ("device", torch.device("meta"), ValueError, "has no memory to fork into"),
    ("device", "mps", ValueError, "device='mps': tensors can be forked to CPUs and CUDA's GPUs alone"),
    ("device", "xpu:0", ValueError, "alone"),
    ("device", 0, TypeError, "device must be a device or its name, such as 'cpu' or 'cuda:0', not 0"),
    ("device", True, TypeError, "must be a device"),
    ("transport", 5, TypeError, "transport must be a name or a Transport"),
    ("transport", "carrier pigeon", tensorfork.TransportUnavailable, "there is no transport"),
    ("verify", "no", TypeError, "verify must be True or False, not str"),
    ("verify", 1, TypeError, "not int"),
    ("verify", None, TypeError, "not NoneType"),
    ("arena", "no", TypeError, "arena must be True or False, not str"),
    ("progress", "bar", TypeError, "progress must be a function"),
    ("trace", 7, TypeError, "trace must be a trace id as text, not int"),
    ("trace", bytes(16), TypeError, "not bytes"),
    ("trace", "", ValueError, "trace must be 32 lower-case hexadecimal digits"),
    ("trace", "4BF92F3577B34DA6A3CE929D0E0E4736", ValueError, "lower-case"),
    ("trace", "0" * 32, ValueError, "not all 0"),
    ("trace", "4bf92f3577b34da6a3ce929d0e0e4736" + chr(10), ValueError, "32"),
    ("identity", "llama", TypeError, "identity"),
    ("rank", 3, TypeError, "rank"),
    ("version", 3, TypeError, "version must be"),
    ("at_least", "3", TypeError, "at_least must be"),
    ("at_least", -1, ValueError, "at_least must be"),
    ("include", [3], TypeError, "must be names or patterns"),
    ("include", "layer.\ud800", ValueError, r"include .* no text"),
    ("exclude", ["a", "\udfff"], ValueError, r"exclude .* no text"),
    ("version", "step-\ud800", ValueError, "version .* no text"),
]


@pytest.mark.parametrize("fork", ["fork_into", "fork"])
@pytest.mark.parametrize(("name", "value", "error", "text"), WRONG, ids=lambda one: ascii(one)[:20])
def test_what_cannot_be_is_an_error_before_anything_happens(
    nobody: str, fork: str, name: str, value: Any, error: type[Exception], text: str
) -> None:
    call = partial(tensorfork.fork_into, Untouchable()) if fork == "fork_into" else tensorfork.fork
    with pytest.raises(error, match=text):
        call(nobody, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("peer", "error"), [("nowhere", ValueError), ("tcp://0.0.0.0:1", ValueError), (7, TypeError), (None, TypeError)]
)
def test_what_is_no_address_is_an_error_before_the_model_is_walked(peer: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        tensorfork.fork_into(Untouchable(), peer)
    with pytest.raises(error):
        tensorfork.fork(peer)


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99", torch.device("cuda", 3)])
def test_a_gpu_that_is_not_there_is_an_error_before_anything_happens(nobody: str, device: Any) -> None:
    with pytest.raises(ValueError, match="CUDA finds no GPU in this process; say device='cpu'"):
        tensorfork.fork_into(Untouchable(), nobody, device=device)


@pytest.mark.gpu
def test_a_gpu_beyond_the_last_is_an_error_before_anything_happens(nobody: str) -> None:
    with pytest.raises(ValueError, match=r"device='cuda:99', and this process sees \d+ GPUs, from cuda:0 on"):
        tensorfork.fork_into(Untouchable(), nobody, device="cuda:99")


@pytest.mark.gpu
def test_a_gpu_without_a_number_is_the_current_one() -> None:
    with tensorfork.publish({"a": torch.arange(3.0)}) as seed:
        assert tensorfork.fork(seed.address, device="cuda", timeout=SECONDS)["a"].device == torch.device("cuda", 0)


@pytest.mark.parametrize(
    "terms",
    [
        {"device": "cpu:0"},
        {"device": torch.device("cpu", 1)},
        {"timeout": DAY},
        {"timeout": Fraction(20)},
        {"timeout": 20},
        {"wait": inf},
        {"wait": 0},
        {"wait": 2 * DAY},
        {"restarts": 0},
        {"restarts": 10**9},
    ],
    ids=str,
)
def test_what_can_be_is_right(terms: dict[str, Any]) -> None:
    with tensorfork.publish({"a": torch.arange(3.0)}) as seed, torch.device("meta"):
        ours = {"a": torch.empty(3)}
        with torch.device("cpu"):
            assert tensorfork.fork_into(ours, seed.address, **{"timeout": SECONDS} | terms).verified
    assert ours["a"].tolist() == [0.0, 1.0, 2.0]
    assert ours["a"].device == torch.device("cpu")


# The seed.


@pytest.mark.parametrize("call", ["suspend", "drain", "close"])
@pytest.mark.parametrize(("timeout", "error"), [
    (-1, ValueError), (nan, ValueError), (inf, ValueError), (DAY + 1, ValueError), ("1", TypeError), (True, TypeError)
])  # fmt: skip
def test_a_time_that_cannot_be_changes_nothing_of_the_seed(call: str, timeout: Any, error: type[Exception]) -> None:
    with tensorfork.publish({"a": torch.arange(3.0)}) as seed:
        with pytest.raises(error, match="timeout"):
            getattr(seed, call)(timeout=timeout)
        assert tensorfork.fork(seed.address, timeout=SECONDS)["a"].tolist() == [0.0, 1.0, 2.0]


def test_no_time_at_all_is_a_look() -> None:
    with tensorfork.publish({"a": torch.arange(3.0)}) as seed:
        assert seed.drain(timeout=0)
        seed.resume()
        seed.suspend(timeout=1)
        seed.close(timeout=0)
        seed.close(timeout=0)


@pytest.mark.parametrize(("terms", "error", "text"), [
    ({"bind": "nowhere"}, ValueError, "is not an address"),
    ({"bind": 4180}, TypeError, "bind must be an address, such as"),
    ({"bind": None}, TypeError, "bind must be an address"),
    ({"bind": "tcp://0.0.0.0:*"}, ValueError, "say with advertise="),
    ({"advertise": 4180}, TypeError, "advertise must be an address"),
    ({"advertise": "a b"}, ValueError, "not an address by which forks can come"),
    ({"snapshot": "nonsense"}, ValueError, "snapshot='nonsense' is no device"),
    ({"snapshot": "meta"}, ValueError, "snapshot='meta' has no memory"),
    ({"snapshot": 1}, TypeError, "snapshot must be a device"),
    ({"include": "\ud800"}, ValueError, "no text"),
    ({"identity": "llama"}, TypeError, "identity"),
    ({"rank": (0, 1)}, TypeError, "rank"),
    ({"version": "\ud800"}, ValueError, "version .* no text"),
    ({"version": 3}, TypeError, "version must be"),
    ({"stable": "yes"}, TypeError, "stable must be True or False, not str"),
], ids=str)  # fmt: skip
def test_what_cannot_be_published_so_is_an_error_before_the_model_is_walked(
    terms: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        tensorfork.publish(Untouchable(), **terms)


# Text that cannot be sent: half of a surrogate pair, as os.fsdecode and json make them.

LONE = "\ud83d"


@pytest.mark.parametrize("make", [
    lambda: tensorfork.Identity(model=LONE),
    lambda: tensorfork.Identity(tags={"a": LONE}),
    lambda: tensorfork.Identity(kernels={LONE: "a"}),
    lambda: tensorfork.Version("0a", 1, LONE),
], ids=["identity", "tag", "key of a kernel", "label"])  # fmt: skip
def test_text_that_cannot_be_sent_is_refused_where_it_is_given(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="no text"):
        make()


def test_a_label_that_cannot_be_sent_is_refused_before_the_weights_change() -> None:
    with tensorfork.publish({"a": torch.arange(3.0)}) as seed:
        with pytest.raises(ValueError, match="no text"), seed.updating(version=LONE):
            raise AssertionError("the change has begun")
        assert seed.generation == 0
        assert seed.version.label is None


class Named(torch.nn.Module):
    """A module with a tensor under a name that cannot be sent, which `setattr` does not refuse."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer("right", torch.zeros(3))
        self.register_buffer(name, torch.zeros(3))


@pytest.mark.parametrize("model", [
    lambda: {f"layer{LONE}": torch.zeros(3)},
    lambda: Named(f"layer{LONE}"),
    lambda: {"a" * 5000: torch.zeros(3)},
], ids=["mapping", "module", "too long"])  # fmt: skip
@pytest.mark.parametrize("side", ["publish", "fork_into"])
def test_a_tensor_whose_name_cannot_be_sent_is_unsupported_on_both_sides(
    nobody: str, side: str, model: Callable[[], Any]
) -> None:
    with pytest.raises(tensorfork.UnsupportedTensor, match="name"):
        tensorfork.publish(model()) if side == "publish" else tensorfork.fork_into(model(), nobody)


def test_a_tensor_whose_name_cannot_be_sent_may_be_excluded() -> None:
    theirs, ours = Named(f"layer{LONE}"), Named(f"layer{LONE}")
    theirs.right += 1
    with tensorfork.publish(theirs, exclude="layer*") as seed:
        tensorfork.fork_into(ours, seed.address, exclude="layer*", timeout=SECONDS)
    assert ours.right.tolist() == [1.0, 1.0, 1.0]
