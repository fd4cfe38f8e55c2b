"""A generated model of a given size: the layers of a small language model, in bfloat16, filled with random numbers."""

import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from tensorfork.demo.subjects import Outcome, similarities

HEAD = 64
LAYERS = 8
"""At least so many; more where the size allows."""
PROMPTS = 4
TOKENS = 16
CHUNK = 32 << 20
_DTYPE = torch.bfloat16


class Generated:
    """As near to `nbytes` bytes, from 1 MiB, as one row of its embedding allows."""

    def __init__(self, nbytes: int) -> None:
        hidden = HEAD
        while 2 * hidden <= 8192 and LAYERS * layer_bytes(2 * hidden) <= nbytes:
            hidden *= 2
        self.hidden = hidden
        self.layers = max(LAYERS, int(nbytes * 15 / 16) // layer_bytes(hidden))
        rest = nbytes - self.layers * layer_bytes(hidden)
        self.vocabulary = max(TOKENS, rest // (hidden * _DTYPE.itemsize) - 1)

    def load(self) -> nn.Module:
        """See `Subject.load`: there is nothing to read, so it is filled."""
        model = Network(self.hidden, self.layers, self.vocabulary, "cpu")
        with ThreadPoolExecutor() as pool:
            list(pool.map(_fill, *zip(*_chunks(model), strict=True)))
        return model

    def build(self) -> nn.Module:
        """See `Subject.build`."""
        return Network(self.hidden, self.layers, self.vocabulary, "meta")

    @torch.inference_mode()
    def compute(self, model: nn.Module) -> Outcome:
        """See `Subject.compute`."""
        ids = torch.randint(0, self.vocabulary, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))
        hidden = model(ids)
        vectors = hidden.float().mean(1)
        shown = [f"random token ids, row {i + 1}" for i in range(PROMPTS)]
        outputs = {"hidden": hidden, "vectors": vectors}
        return Outcome(outputs, shown, "rows of random token ids", list(vectors.shape), similarities(vectors))


class Network(nn.Module):
    """Embedding, layers, norm and a head that is tied to the embedding."""

    def __init__(self, hidden: int, layers: int, vocabulary: int, device: str) -> None:
        super().__init__()
        self.embedding = _Matrix(vocabulary, hidden, device)
        self.layers = nn.ModuleList(_Layer(hidden, device) for _ in range(layers))
        self.norm = _Norm(hidden, device)
        self.head = _Matrix(vocabulary, hidden, device)
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
        self.q, self.k, self.v, self.o = (_Matrix(hidden, hidden, device) for _ in range(4))
        self.up, self.gate = (_Matrix(_wide(hidden), hidden, device) for _ in range(2))
        self.down = _Matrix(hidden, _wide(hidden), device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_1(x)
        q, k, v = (matrix(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for matrix in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        after: torch.Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return after


class _Matrix(nn.Module):
    """A linear layer that does not spend time on a beginning nobody uses."""

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
    return (4 * hidden * hidden + 3 * hidden * _wide(hidden) + 2 * hidden) * _DTYPE.itemsize


def _wide(hidden: int) -> int:
    return hidden * 8 // 3 // HEAD * HEAD


def _chunks(model: nn.Module) -> list[tuple[torch.Tensor, float, int]]:
    """What to fill, with the numbers' bound and the seed of their generator."""
    found = []
    for name, tensor in model.named_parameters():
        bound = (3 / tensor.shape[-1]) ** 0.5
        for i, part in enumerate(tensor.view(-1).split(CHUNK // _DTYPE.itemsize)):
            found.append((part, bound, zlib.crc32(f"{name} {i}".encode())))
    return found


def _fill(part: torch.Tensor, bound: float, seed: int) -> None:
    part.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
