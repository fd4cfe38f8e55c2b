"""Checksums of tensors: 64 bits each, the same on CPU and GPU, against accident rather than attackers.

In words. A tensor's bytes are read in the order in which they lie (dimensions by falling stride), in segments of 32
MiB, as little-endian 64-bit words, the last one filled up with zeros. All arithmetic is on integers modulo 2^64, so
the order of additions does not matter, and every device gets the same result. For each segment x[0..n) three families
of sums are taken:

    c[j] = sum of x[1024 i + j] over i             (columns)
    d[j] = sum of x[1021 i + j] over i             (columns of another width; 1021 is prime)
    r[i] = sum of x[1024 i + j] over j < 1024      (rows)

The segment's digest is the sum over all these v[k], in this order, of mix(v[k]) * w[k], with fixed odd pseudo-random
weights w, where mix is a bijection that carries high bits down (two xor-shifts round a multiplication; the finaliser
of Steele, Lea and Flood's SplitMix64 is the model). The tensor's digest is the sum over its segments of mix(digest) *
w[segment].

Why three. Rows and columns see every changed, moved and exchanged word, but not four equal and opposite changes at the
corners of a rectangle. Those lie in columns of the other width as well only when the rectangle's height is a multiple
of 1021 rows, where 1024 h = 1021 k, beyond the length of any side such an accident has; what remains unseen needs eight
changes at the corners of a box whose sides are tuned to all three.

Plain torch, nothing compiled: a kernel that must be built first costs more than the copy it checks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from attrs import frozen

SEGMENT = 32 << 20
"""Bytes of a tensor that are summed together."""
NAME = "sums3/1"
"""Names this definition on the wire: two sides compare digests only when they compute the same thing."""

WIDTH, OTHER_WIDTH = 1024, 1021
_WORDS = SEGMENT // 8
_COLUMNS = WIDTH + OTHER_WIDTH
_SLOTS = _COLUMNS + _WORDS // WIDTH
"""A segment's sums stand in this order: columns, columns of the other width, rows."""
_POOL = 320 << 10
"""Words of sums that are gathered before they are mixed."""


@frozen
class _Pace:
    """How a kind of device likes its work cut, in words."""

    block: int
    """Summed at a time: what a core's cache holds, and below 32,768, where torch would wake its other threads; a whole
    segment where the launch is what costs."""
    stage: int
    """Scratch for bytes that must be copied to be summed: misaligned, with gaps, or too small to go alone."""
    small: int
    """Tensors up to this go side by side."""


_PACES = {"cpu": _Pace(31 * WIDTH, 1 << 17, 1 << 14), "cuda": _Pace(_WORDS, 1 << 20, 1 << 14)}


def digests(tensors: Mapping[str, torch.Tensor], cancelled: Callable[[], bool] = lambda: False) -> dict[str, int]:
    """The digest of each tensor's elements, as an unsigned 64-bit integer, by name. Ties are computed once.

    Reads in place, with at most 16 MiB of scratch on each device. Work is enqueued on the current stream of each
    tensor's device; the values are back on the host when this returns. Once `cancelled()` it stops between two groups
    of tensors, and returns nothing.
    """
    names: dict[_Key, list[str]] = defaultdict(list)
    by_device: dict[torch.device, dict[_Key, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        key: _Key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        names[key].append(name)
        by_device[tensor.device][key] = tensor
    found: dict[str, int] = {}
    with torch.inference_mode():
        for device, unique in by_device.items():
            summing = _Summing(device)
            for group in _groups(unique, _PACES.get(device.type, _PACES["cuda"])):
                if cancelled():
                    return {}
                summing.add(group)
            for key, value in summing.finish().items():
                found.update(dict.fromkeys(names[key], value))
    return found


def digest(tensor: torch.Tensor) -> int:
    """The digest of one tensor."""
    return digests({"": tensor})[""]


_Key = tuple[object, ...]


@frozen
class _Group:
    """Tensors of one length, summed together: the same bytes at the same spacing, or tensors to be copied."""

    keys: Sequence[_Key]
    tensors: Sequence[torch.Tensor]
    matrix: torch.Tensor | None
    """Their bytes, [tensor, byte], readable as words; None where they must be copied first."""


def _groups(tensors: Mapping[_Key, torch.Tensor], pace: _Pace) -> Iterator[_Group]:
    """Longest first, so that neighbours in time have slots of about one size."""
    lengths: dict[int, list[tuple[_Key, torch.Tensor]]] = defaultdict(list)
    apart: list[_Group] = []
    for key, tensor in tensors.items():
        flat = _flat(tensor)
        if flat is None:
            apart.append(_Group([key], [tensor], None))
        else:
            lengths[flat.numel()].append((key, flat))
    for nbytes in sorted(lengths, reverse=True):
        same = sorted(lengths[nbytes], key=lambda one: one[1].data_ptr())
        if nbytes <= pace.small * 8:
            step = max(1, pace.stage * 8 // max(nbytes + 7, 8))
            for start in range(0, len(same), step):
                keys, flats = zip(*same[start : start + step], strict=True)
                yield _Group(keys, flats, None)
        else:
            yield from _spaced(same)
    yield from apart


def _spaced(same: Sequence[tuple[_Key, torch.Tensor]]) -> Iterator[_Group]:
    """Of tensors of one length, by address: each row of neighbours with equal spacing in one storage is a group."""
    at = 0
    while at < len(same):
        flat = same[at][1]
        nbytes, base = flat.numel(), flat.untyped_storage().data_ptr()
        step, count = 0, 1
        while at + count < len(same) and count * nbytes < SEGMENT:
            other = same[at + count][1]
            gap = other.data_ptr() - same[at + count - 1][1].data_ptr()
            if other.untyped_storage().data_ptr() != base or gap != (step or gap) or gap % 8 or gap < nbytes:
                break
            step, count = gap, count + 1
        keys, flats = zip(*same[at : at + count], strict=True)
        if flat.data_ptr() % 8:
            for key, one in zip(keys, flats, strict=True):
                yield _Group([key], [one], None)
        else:
            yield _Group(keys, flats, flat.as_strided((count, nbytes), (step or -(-nbytes // 8) * 8, 1)))
        at += count


class _Summing:
    """Sums segments into slots, and mixes many of them at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pace = _PACES.get(device.type, _PACES["cuda"])
        self._weights = _weights(_SLOTS).to(device)
        self._pool = torch.zeros(_POOL, dtype=torch.int64, device=device)
        self._width = 0
        self._owners: list[_Key] = []
        self._order: list[_Key] = []
        self._mixed: list[torch.Tensor] = []
        self._stage: torch.Tensor | None = None
        self._empty: list[_Key] = []

    def add(self, group: _Group) -> None:
        """Sum one group of tensors."""
        if not group.tensors[0].numel():
            self._empty += group.keys
        elif group.matrix is not None:
            self._sum_in_place(group.keys, group.matrix)
        elif len(group.keys) > 1 or _flat(group.tensors[0]) is not None:
            self._sum_stacked(group)
        else:
            self._sum_filled(group.keys, _fill(self._scratch(), group.tensors[0]))

    def finish(self) -> dict[_Key, int]:
        """Every tensor's digest."""
        self._mix()
        values = torch.cat(self._mixed).tolist() if self._mixed else []
        segments: dict[_Key, list[int]] = defaultdict(list)
        for key, value in zip(self._order, values, strict=True):
            segments[key].append(value)
        found = dict.fromkeys(self._empty, 0)
        for key, parts in segments.items():
            found[key] = sum(_mix_int(part) * _weight_int(i) for i, part in enumerate(parts)) & _MASK
        return found

    def _sum_in_place(self, keys: Sequence[_Key], matrix: torch.Tensor) -> None:
        nbytes = matrix.shape[1]
        for start in range(0, nbytes, SEGMENT):
            segment = matrix[:, start : start + SEGMENT]
            whole, tail = divmod(segment.shape[1], 8)
            slots = self._take(keys, whole + bool(tail))
            if whole:
                _sum(segment[:, : whole * 8].view(torch.int64), 0, slots, self._pace.block)
            if tail:
                last = torch.zeros(len(keys), 8, dtype=torch.uint8, device=self._device)
                last[:, :tail] = segment[:, whole * 8 :]
                _sum(last.view(torch.int64), whole, slots, self._pace.block)

    def _sum_stacked(self, group: _Group) -> None:
        flats = group.tensors
        nbytes = flats[0].numel()
        if nbytes > self._pace.stage * 8:
            self._sum_filled(group.keys, _fill(self._scratch(), flats[0]))
            return
        words = -(-nbytes // 8)
        stacked = self._scratch()[: len(flats) * words * 8].view(len(flats), words * 8)
        stacked[:, words * 8 - 8 :] = 0
        for row, flat in zip(stacked, flats, strict=True) if len(flats) < 3 else ():
            row[:nbytes] = flat
        if len(flats) >= 3:
            torch.stack(list(flats), out=stacked[:, :nbytes])
        _sum(stacked.view(torch.int64), 0, self._take(group.keys, words), self._pace.block)

    def _sum_filled(self, keys: Sequence[_Key], parts: Iterator[int]) -> None:
        """Of one tensor whose bytes come in parts through the scratch, each but the last filling it."""
        stage, at = self._scratch(), _WORDS
        for filled in parts:
            if at == _WORDS:
                slots, at = self._take(keys, _WORDS), 0
            padded = -(-filled // 8) * 8
            stage[filled:padded] = 0
            _sum(stage[:padded].view(1, padded).view(torch.int64), at, slots, self._pace.block)
            at += padded // 8

    def _scratch(self) -> torch.Tensor:
        if self._stage is None:
            self._stage = torch.empty(self._pace.stage * 8, dtype=torch.uint8, device=self._device)
        return self._stage

    def _take(self, keys: Sequence[_Key], words: int) -> torch.Tensor:
        """Zeroed slots for one more segment, of so many words, of each key's tensor: [key, slot]."""
        width = _COLUMNS + -(-words // WIDTH)
        used = len(self._owners)
        if used and (not width <= self._width <= 2 * width or (used + len(keys)) * self._width > _POOL):
            self._mix()
            used = 0
        if not used:
            self._width = width
        if len(keys) * width > self._pool.numel():
            self._pool = torch.zeros(len(keys) * width, dtype=torch.int64, device=self._device)
        self._owners += keys
        return self._pool[used * self._width :][: len(keys) * self._width].view(len(keys), self._width)

    def _mix(self) -> None:
        if self._owners:
            used = self._pool[: len(self._owners) * self._width].view(len(self._owners), self._width)
            self._mixed.append(_mix_(used).mul_(self._weights[: self._width]).sum(1))
            self._order += self._owners
            self._owners = []
            used.zero_()


def _sum(x: torch.Tensor, at: int, slots: torch.Tensor, block: int) -> None:
    """Add to the slots [k, slot] the sums of the words x [k, n], which stand at `at` in their segments."""
    n = x.shape[1]
    columns, others, rows = slots[:, :WIDTH], slots[:, WIDTH:_COLUMNS], slots[:, _COLUMNS:]
    if at % WIDTH:  # less than a row: a last word
        rows[:, at // WIDTH] += x[:, 0]
        columns[:, at % WIDTH] += x[:, 0]
        others[:, at % OTHER_WIDTH] += x[:, 0]
        return
    other = min(n, -at % OTHER_WIDTH)
    if other:
        others[:, OTHER_WIDTH - -at % OTHER_WIDTH :][:, :other] += x[:, :other]
    step = max(1, block // len(x) // WIDTH)
    full = n // WIDTH
    matrix = x[:, : full * WIDTH].unflatten(1, (full, WIDTH))
    full_other = (n - other) // OTHER_WIDTH
    matrix_other = x[:, other : other + full_other * OTHER_WIDTH].unflatten(1, (full_other, OTHER_WIDTH))
    first = at // WIDTH
    blocks = max(-(-full // step), -(-full_other // step))
    partial = torch.zeros(2, blocks, len(x), WIDTH, dtype=torch.int64, device=x.device)
    parts, others_parts = matrix.split(step, 1), matrix_other.split(step, 1)
    row_parts = rows[:, first : first + full].split(step, 1)
    outs, other_outs = partial[0], partial[1, :, :, :OTHER_WIDTH]
    for i in range(blocks):  # all three sums of a block while it is in the cache
        if full and i < len(parts):
            torch.sum(parts[i], 2, out=row_parts[i])
            torch.sum(parts[i], 1, out=outs[i])
        if full_other and i < len(others_parts):
            torch.sum(others_parts[i], 1, out=other_outs[i])
    columns += partial[0].sum(0)
    others += partial[1, :, :, :OTHER_WIDTH].sum(0)
    if n % WIDTH:
        rest = x[:, full * WIDTH :]
        rows[:, first + full] += rest.sum(1)
        columns[:, : rest.shape[1]] += rest
    other += full_other * OTHER_WIDTH
    if other < n:
        others[:, : n - other] += x[:, other:]


def _flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor's bytes as they lie, as a view; None where there are gaps or overlaps between its elements."""
    tensor = tensor.detach()
    tensor = _by_stride(tensor)
    if not tensor.is_contiguous():
        return None
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size(), (tensor.nbytes,), (1,)
    )


def _fill(stage: torch.Tensor, tensor: torch.Tensor) -> Iterator[int]:
    """Copy the tensor's elements into the stage, which is handed out each time it is full; yields its bytes in use."""
    room = stage.numel() // tensor.element_size()
    view = stage.view(tensor.dtype) if tensor.dtype is not torch.uint8 else stage
    used = 0
    for part in _slabs(_by_stride(tensor.detach()), room):
        flat = part.reshape(-1) if part.numel() <= room else part
        taken = 0
        while taken < flat.numel():
            n = min(room - used, flat.numel() - taken)
            view[used : used + n] = flat[taken : taken + n]
            used, taken = used + n, taken + n
            if used == room:
                yield used * tensor.element_size()
                used = 0
    if used:
        yield used * tensor.element_size()


def _by_stride(tensor: torch.Tensor) -> torch.Tensor:
    stride, shape = tensor.stride(), tensor.shape
    return tensor.permute(sorted(range(tensor.dim()), key=lambda i: (-stride[i], -shape[i])))


def _slabs(tensor: torch.Tensor, room: int) -> Iterator[torch.Tensor]:
    """Cut along the leading dimensions into parts of at most a quarter of `room` elements, in order."""
    bound = room // 4
    if tensor.numel() <= bound or tensor.dim() <= 1:
        yield from tensor.split(bound) if tensor.dim() else [tensor]
        return
    inner = tensor[0].numel()
    if inner > bound:
        for part in tensor:
            yield from _slabs(part, room)
    else:
        yield from tensor.split(max(1, bound // inner))


_ODD = 0xBF58476D1CE4E5B9
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix_(words: torch.Tensor) -> torch.Tensor:
    """In place: v ^= v >>> 32; v *= odd; v ^= v >>> 29. Zero stays zero."""
    high = words >> 32
    words ^= high.bitwise_and_(0xFFFFFFFF)
    words *= _signed(_ODD)
    torch.bitwise_right_shift(words, 29, out=high)
    words ^= high.bitwise_and_((1 << 35) - 1)
    return words


def _mix_int(value: int) -> int:
    value &= _MASK
    value ^= value >> 32
    value = value * _ODD & _MASK
    return value ^ (value >> 29)


def _weight_int(index: int) -> int:
    """The odd weight of one slot or segment."""
    return _mix_int(((index + 1) * _GOLDEN) & _MASK) | 1


def _weights(count: int) -> torch.Tensor:
    state = torch.arange(1, count + 1, dtype=torch.int64) * _signed(_GOLDEN)
    return _mix_(state) | 1


def digest_of_words(words: Sequence[int]) -> int:
    """The digest of a tensor of 64-bit words by the definition above, word for word: what the tests compare with."""
    total = 0
    for segment in range(0, len(words), _WORDS):
        x = words[segment : segment + _WORDS]
        slots = [0] * _SLOTS
        for k, word in enumerate(x):
            slots[k % WIDTH] += word
            slots[WIDTH + k % OTHER_WIDTH] += word
            slots[_COLUMNS + k // WIDTH] += word
        value = sum(_mix_int(v) * _weight_int(k) for k, v in enumerate(slots))
        total += _mix_int(value) * _weight_int(segment // _WORDS)
    return total & _MASK
