"""A generated model of a given size: the layers of a small language model, in bfloat16, filled with random numbers."""

import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from tensorfork.demo.models import Computed, similarities

HEAD_SIZE = 64
MIN_LAYERS = 8
"""There are more layers where the size allows it."""
MAX_HIDDEN = 8192
PROMPTS = 4
TOKENS = 16
CHUNK_BYTES = 32 << 20
"""What one thread fills at a time."""
_DTYPE = torch.bfloat16


class GeneratedModel:
    """A model of `nbytes` bytes (1 MiB or more), less than two rows of its embedding short of them."""

    def __init__(self, nbytes: int) -> None:
        hidden = HEAD_SIZE
        while 2 * hidden <= MAX_HIDDEN and MIN_LAYERS * layer_bytes(2 * hidden) <= nbytes:
            hidden *= 2
        self.hidden = hidden
        self.layers = max(MIN_LAYERS, int(nbytes * 15 / 16) // layer_bytes(hidden))
        rest = nbytes - self.layers * layer_bytes(hidden)
        self.vocabulary = max(TOKENS, rest // (hidden * _DTYPE.itemsize) - 1)

    def load(self) -> nn.Module:
        """See `DemoModel.load`. There is no file to read, so the model is filled with random numbers."""
        model = Network(self.hidden, self.layers, self.vocabulary, "cpu")
        with ThreadPoolExecutor() as pool:
            list(pool.map(_fill, *zip(*_chunks(model), strict=True)))
        return model

    def build(self) -> nn.Module:
        """See `DemoModel.build`."""
        return Network(self.hidden, self.layers, self.vocabulary, "meta")

    @torch.inference_mode()
    def compute(self, model: nn.Module) -> Computed:
        """See `DemoModel.compute`."""
        ids = torch.randint(0, self.vocabulary, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))
        hidden = model(ids)
        vectors = hidden.float().mean(1)
        shown = [f"random token ids, row {i + 1}" for i in range(PROMPTS)]
        outputs = {"hidden": hidden, "vectors": vectors}
        return Computed(outputs, shown, "rows of random token ids", list(vectors.shape), similarities(vectors))


class Network(nn.Module):
    """An embedding, layers, a norm, and a head that is tied to the embedding."""

    def __init__(self, hidden: int, layers: int, vocabulary: int, device: str) -> None:
        super().__init__()
        self.embedding = _Linear(vocabulary, hidden, device)
        self.layers = nn.ModuleList(_Layer(hidden, device) for _ in range(layers))
        self.norm = _Norm(hidden, device)
        self.head = _Linear(vocabulary, hidden, device)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states."""
        x = nn.functional.embedding(ids, self.embedding.weight)
        for layer in self.layers:
            x = layer(x)
        normed: torch.Tensor = self.norm(x)
        return normed


class _Layer(nn.Module):
    def __init__(self, hidden: int, device: str) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = _Norm(hidden, device), _Norm(hidden, device)
        self.q, self.k, self.v, self.o = (_Linear(hidden, hidden, device) for _ in range(4))
        self.up, self.gate = (_Linear(_intermediate_size(hidden), hidden, device) for _ in range(2))
        self.down = _Linear(hidden, _intermediate_size(hidden), device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_1(x)
        q, k, v = (linear(y).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        output: torch.Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return output


class _Linear(nn.Module):
    """A linear layer whose weight is not initialized, since `_fill` or a fork overwrites it."""

    def __init__(self, rows: int, columns: int, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=_DTYPE, device=device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class _Norm(nn.Module):
    def __init__(self, hidden: int, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, dtype=_DTYPE, device=device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)


def layer_bytes(hidden: int) -> int:
    """Bytes of one layer's weights."""
    return (4 * hidden * hidden + 3 * hidden * _intermediate_size(hidden) + 2 * hidden) * _DTYPE.itemsize


def _intermediate_size(hidden: int) -> int:
    return hidden * 8 // 3 // HEAD_SIZE * HEAD_SIZE


def _chunks(model: nn.Module) -> list[tuple[torch.Tensor, float, int]]:
    """Chunks of the model's tensors, each with its numbers' bound and its generator's seed."""
    chunks = []
    for name, tensor in model.named_parameters():
        bound = (3 / tensor.shape[-1]) ** 0.5
        for i, part in enumerate(tensor.view(-1).split(CHUNK_BYTES // _DTYPE.itemsize)):
            chunks.append((part, bound, zlib.crc32(f"{name} {i}".encode())))
    return chunks


def _fill(part: torch.Tensor, bound: float, seed: int) -> None:
    part.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
