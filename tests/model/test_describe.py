"""Layouts: what a model is made of, and where each tensor lies in its storages."""

import itertools
from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from tensorfork import LayoutMismatch, ModelLayout, StorageLayout, TensorLayout, UnsupportedTensor
from tensorfork.fork.match import match
from tensorfork.layout import plain_stride
from tensorfork.model.describe import describe
from tensorfork.model.storages import ALIGNMENT, TensorLocation, storage_extents


def elements(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """The offset of every element, in order."""
    return [
        sum(i * step for i, step in zip(index, stride, strict=True)) for index in itertools.product(*map(range, shape))
    ]


def tensor_named(layout: ModelLayout, name: str) -> TensorLayout:
    return next(tensor for tensor in layout.tensors if tensor.name == name)


# Where tensors lie.


@st.composite
def models(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes over a few buffers: views, ties, overlaps, strides, or no tensor at all."""
    buffers = [torch.zeros(draw(st.integers(0, 3000)), dtype=torch.uint8) for _ in range(draw(st.integers(1, 3)))]
    made: dict[str, torch.Tensor] = {}
    for i in range(draw(st.integers(0, 8))):
        if made and draw(st.integers(0, 4)) == 0:
            made[f"t{i}"] = made[draw(st.sampled_from(sorted(made)))]
            continue
        buffer = draw(st.sampled_from(buffers))
        dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex128]))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        stride = [draw(st.integers(0, 9)) for _ in shape]
        free = buffer.nbytes // dtype.itemsize - sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) - 1
        if 0 not in shape and free < 0:
            shape, stride = [0], [1]
        offset = draw(st.integers(0, max(free, 0))) if 0 not in shape else 0
        made[f"t{i}"] = torch.empty(0, dtype=dtype).set_(buffer.untyped_storage(), offset, shape, stride)
    return made


@settings(max_examples=200)
@given(model=models())
def test_every_tensor_lies_where_its_layout_says(model: dict[str, torch.Tensor]) -> None:
    found = describe(model)
    regions = {region.id: region for region in found.memory.regions(found.layout)}
    for tensor in found.layout.tensors:
        real = model[tensor.name]
        assert (tensor.torch_dtype, tensor.shape, tensor.nbytes) == (real.dtype, tuple(real.shape), real.nbytes)
        assert elements(tensor.shape, tensor.stride) == elements(tuple(real.shape), real.stride())
        if tensor.numel:
            assert regions[tensor.storage].address + tensor.offset == real.data_ptr()
            assert tensor.offset + tensor.extent <= regions[tensor.storage].nbytes


@settings(max_examples=200)
@given(model=models())
def test_storages_hold_what_tensors_use_and_no_byte_is_in_two(model: dict[str, torch.Tensor]) -> None:
    found = describe(model)
    regions = found.memory.regions(found.layout)
    for region, other in itertools.combinations(regions, 2):
        assert region.address + region.nbytes <= other.address or other.address + other.nbytes <= region.address
    for region in regions:
        inside = [tensor for tensor in found.layout.tensors if tensor.storage == region.id and tensor.numel]
        assert max(tensor.offset + tensor.extent for tensor in inside) == region.nbytes
        assert min(tensor.offset for tensor in inside) < ALIGNMENT


def test_ten_rows_of_a_large_buffer_are_a_storage_of_ten_rows() -> None:
    buffer = torch.zeros(1000, 256)
    layout = describe({"rows": buffer[500:510]}).layout
    assert [storage.nbytes for storage in layout.storages] == [10 * 1024]
    assert tensor_named(layout, "rows").offset == 0


def test_a_storage_begins_where_its_tensors_are_as_aligned_as_in_the_allocation() -> None:
    buffer = torch.zeros(10_000, dtype=torch.uint8)
    layout = describe({"odd": buffer[1300:1400], "later": buffer[2048:2100]}).layout
    assert (tensor_named(layout, "odd").offset, tensor_named(layout, "later").offset) == (1300 - 1024, 1024)
    assert layout.storages[0].nbytes == 2100 - 1024


def test_ties_are_several_names_at_one_place() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[1].weight = net[0].weight
    layout = describe(net).layout
    tied, other = tensor_named(layout, "0.weight"), tensor_named(layout, "1.weight")
    assert (tied.storage, tied.offset, tied.stride) == (other.storage, other.offset, other.stride)
    assert len(layout.storages) == 3


@pytest.mark.parametrize("order", [("all", "some", "middle"), ("some", "all", "middle"), ("middle", "some", "all")])
def test_storages_over_the_same_memory_are_one(order: tuple[str, ...]) -> None:
    memory = bytearray(4096)
    tensors = {
        "all": torch.frombuffer(memory, dtype=torch.uint8),
        "some": torch.frombuffer(memory, dtype=torch.uint8, count=100),
        "middle": torch.frombuffer(memory, dtype=torch.float32, offset=1024, count=10),
        "early": torch.frombuffer(memory, dtype=torch.uint8, offset=512, count=10),
    }
    layout = describe({name: tensors[name] for name in (*order, "early")}).layout
    assert len(layout.storages) == 1
    assert tensor_named(layout, "middle").offset == 1024


def test_storages_of_a_gpu_are_in_order_of_address_so_that_a_fork_s_have_the_same_neighbours() -> None:
    class Storage:
        def nbytes(self) -> int:
            return 1024

    def located(device: str, base: int) -> TensorLocation:
        return TensorLocation((device, base), base, device, 0, 1024, Storage(), True)

    locations = [
        located("cuda:1", 1024),
        located("cuda:0", 8192),
        located("cpu", 4096),
        located("cuda:0", 6144),
        located("cpu", 2048),
    ]
    extents = storage_extents(locations)
    assert [(extent.device, extent.base) for extent in extents.values()] == [
        ("cpu", 4096),
        ("cpu", 2048),
        ("cuda:0", 6144),
        ("cuda:0", 8192),
        ("cuda:1", 1024),
    ]
    assert [extent.index for extent in extents.values()] == [0, 1, 2, 3, 4]
    assert [location.extent.index for location in locations] == [4, 3, 0, 2, 1]


def test_every_storage_over_the_same_memory_is_kept_alive() -> None:
    memory = bytearray(1024)
    tensors = {str(at): torch.frombuffer(memory, dtype=torch.uint8, offset=at) for at in (0, 100, 200)}
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors.values()]
    memory_of_model = describe(tensors).memory
    tensors.clear()
    assert not any(storage.expired() for storage in storages)
    del memory_of_model
    assert all(storage.expired() for storage in storages)


def test_a_float_at_an_odd_place_of_shared_memory_is_named_and_refused() -> None:
    memory = bytearray(4096)
    tensors = {
        "all": torch.frombuffer(memory, dtype=torch.uint8),
        "odd": torch.frombuffer(memory, dtype=torch.float32, offset=1023, count=10),
    }
    with pytest.raises(UnsupportedTensor, match=r"^odd: in memory that it shares"):
        describe(tensors)


def test_meta_tensors_that_share_a_storage_share_it_in_the_layout() -> None:
    with torch.device("meta"):
        base = torch.empty(100)
        model = {"left": base[:50], "right": base[50:], "other": torch.empty(5)}
    found = describe(model)
    left, right, other = found.layout.tensors
    assert (left.storage, right.storage, right.offset - left.offset) == (0, 0, 200)
    assert other.storage == 1
    assert found.memory.addresses == [None, None]
    assert found.memory.regions(found.layout) == []


def test_tensors_without_elements_have_no_bytes_and_share_with_nobody() -> None:
    buffer = torch.zeros(10)
    layout = describe({"empty": buffer[5:5], "void": torch.empty(0, 3), "full": buffer}).layout
    assert layout.nbytes == 40
    assert tensor_named(layout, "empty").storage != tensor_named(layout, "full").storage
    assert [tensor_named(layout, name).extent for name in ("empty", "void", "full")] == [0, 0, 40]


def test_regions_keep_the_memory_that_they_name_alive() -> None:
    tensor = torch.full((1000,), 7, dtype=torch.uint8)
    storage = StorageWeakRef(tensor.untyped_storage())
    found = describe({"a": tensor})
    region = found.memory.regions(found.layout)[0]
    del tensor, found
    assert not storage.expired()
    del region
    assert storage.expired()


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer, torch.Tensor.clone])
def test_parameters_buffers_and_plain_tensors_are_described_alike(kind: Any) -> None:
    layout = describe({"t": kind(torch.ones(3))}).layout
    assert layout.tensors == (TensorLayout("t", "float32", (3,), (1,), 0, 0),)


def test_a_module_gives_its_parameters_and_all_its_buffers_by_their_names() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    net.register_buffer("mask", torch.ones(2), persistent=False)
    names = {tensor.name for tensor in describe(net).layout.tensors}
    assert names == {*dict(net.named_parameters()), *dict(net.named_buffers())}
    assert {"mask", "1.num_batches_tracked"} <= names


# What cannot be forked.


class Elsewhere(torch.Tensor):
    """A subclass that holds its bytes elsewhere and has no `__tensor_flatten__` to reach them."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(cls, (3,))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def unsupported() -> dict[str, Any]:
    return {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "lazy conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
        "lazy negative": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        "lazy module's": lambda: torch.nn.LazyLinear(3).weight,
        "subclass": Elsewhere,
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*deprecated")
@pytest.mark.parametrize("kind", unsupported())
def test_what_cannot_be_forked_is_named_with_the_reason(kind: str) -> None:
    with pytest.raises(UnsupportedTensor, match=r"^layers\.7\.culprit: .*\w"):
        describe({"fine": torch.ones(2), "layers.7.culprit": unsupported()[kind]()})


def test_an_unsupported_tensor_is_a_type_error_too() -> None:
    with pytest.raises(TypeError, match=r"^w: a sparse_coo tensor cannot be forked"):
        describe({"w": torch.eye(3).to_sparse()})


@pytest.mark.parametrize("thing", [42, "model", [torch.ones(2)], None, torch.ones(2)], ids=repr)
def test_what_is_not_a_model_is_a_type_error_that_says_what_is(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"is not a model; give an nn\.Module, or a mapping of names to tensors"):
        describe(thing)


@pytest.mark.parametrize("mapping", [{1: torch.ones(2)}, {"a": 2.0}, {"a": {"b": torch.ones(2)}}], ids=repr)
def test_a_mapping_is_of_names_to_tensors(mapping: Any) -> None:
    with pytest.raises(TypeError, match=r"^a mapping must be of names \(str\) to tensors; it has "):
        describe(mapping)


# Descriptions.


@given(
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    data=st.data(),
)
def test_a_plain_stride_reaches_the_same_elements_and_is_one_for_all_that_do(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    stride = tuple(data.draw(st.integers(0, 100)) for _ in shape)
    other = tuple(
        data.draw(st.integers(0, 100)) if n == 1 or 0 in shape else s for n, s in zip(shape, stride, strict=True)
    )
    plain = plain_stride(shape, stride)
    assert elements(shape, plain) == elements(shape, stride)
    assert plain == plain_stride(shape, other) == plain_stride(shape, plain)
    assert plain_stride(shape, torch.empty(shape).stride()) == torch.empty(shape).stride()


@settings(max_examples=200)
@given(shape=st.lists(st.integers(0, 4), max_size=3).map(tuple), data=st.data())
def test_dense_and_extent_are_what_the_elements_say(shape: tuple[int, ...], data: st.DataObject) -> None:
    stride = tuple(data.draw(st.integers(0, 20)) for _ in shape)
    if data.draw(st.booleans()):
        order, step, dense = data.draw(st.permutations(range(len(shape)))), 1, list(stride)
        for i in order:
            dense[i], step = step, step * max(shape[i], 1)
        stride = tuple(dense)
    tensor = TensorLayout("t", "float16", shape, plain_stride(shape, stride), 0, 0)
    offsets = elements(shape, stride)
    assert tensor.extent == (2 * (max(offsets) + 1) if offsets else 0)
    assert tensor.is_dense == (sorted(offsets) == list(range(len(offsets))))


def test_a_layout_equals_another_wherever_the_tensors_lie() -> None:
    tensor = TensorLayout("t", "float16", (2, 3), (3, 1), 0, 0)
    assert tensor == evolve(tensor, storage=3, offset=512)
    assert tensor != evolve(tensor, stride=(1, 2))


def test_a_difference_names_everything_that_differs_with_both_values() -> None:
    theirs = TensorLayout("t", "float16", (2, 3), (3, 1), 0, 0)
    assert theirs.difference(evolve(theirs, offset=64)) is None
    assert theirs.difference(evolve(theirs, dtype="int16")) == "dtype float16 in the seed, int16 here"
    difference = theirs.difference(evolve(theirs, shape=(3, 2), stride=(1, 3)))
    assert difference == "shape (2, 3) in the seed, (3, 2) here; stride (3, 1) in the seed, (1, 3) here"


TENSOR = TensorLayout("t", "float32", (2, 3), (3, 1), 0, 8)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ([TENSOR, TENSOR], "a name stands twice"),
        ([evolve(TENSOR, storage=1)], "t lies in storage 1 of 1"),
        ([evolve(TENSOR, offset=12)], "t reaches beyond its storage"),
        ([evolve(TENSOR, stride=(100, 1))], "t reaches beyond its storage"),
        ([evolve(TENSOR, offset=2)], "t does not begin at a multiple"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_reason(tensors: list[TensorLayout], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ModelLayout(tuple(tensors), (StorageLayout(32, "cpu"),))


@pytest.mark.parametrize(
    "change",
    [{"name": 7}, {"name": "x" * 5000}, {"dtype": None}, {"shape": [2, 3]}, {"shape": (2, -3)}, {"shape": (2, 3.0)},
     {"stride": (True, 1)}, {"stride": (3,)}, {"shape": (1,) * 65}, {"storage": -1}, {"offset": "8"}, {"offset": True}],
    ids=str,
)  # fmt: skip
def test_a_tensor_layout_refuses_values_of_wrong_types_or_ranges(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        evolve(TENSOR, **change)


def test_a_dtype_that_this_torch_lacks_is_named() -> None:
    with pytest.raises(UnsupportedTensor, match=r"^t: torch .* has no dtype 'float3'"):
        ModelLayout((evolve(TENSOR, dtype="float3"),), (StorageLayout(32, "cpu"),))


def test_a_layout_prints_what_it_holds() -> None:
    layout = ModelLayout((TENSOR,), (StorageLayout(32, "cpu"),))
    assert repr(layout) == "<ModelLayout 1 tensors in 1 storages, 0.000 GB on cpu>"
    assert layout.nbytes == 32


def test_models_of_equal_code_match_whatever_their_memory() -> None:
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    assert [pair.name for pair in match(describe(one).layout, describe(other).layout)] == ["weight", "bias"]
    with pytest.raises(LayoutMismatch):
        match(describe(one).layout, describe(torch.nn.Linear(4, 3)).layout)
