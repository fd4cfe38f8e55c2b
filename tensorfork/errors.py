"""Every error that tensorfork raises on purpose, by whose fault it is.

::

    TensorForkError
    ├── the caller's
    │   ├── UnsupportedTensor       a tensor of a kind that cannot be forked (also a TypeError)
    │   ├── IdentityMismatch        the two are not the same model, or not the same part of it
    │   ├── VersionMismatch         the seed has another version of the weights than was asked for
    │   ├── LayoutMismatch          the two models differ in names, dtypes, shapes, strides or ties
    │   ├── ValueMismatch           plain values beside the tensors differ, with values="strict", or cannot be taken
    │   ├── TransportUnavailable    the transport cannot work between these two processes
    │   ├── ResourceExhausted       this process has no memory, file descriptors or threads left for it
    │   └── ForkCancelled           the caller has set `cancel=`
    ├── the peer's
    │   ├── PeerUnreachable         nothing answers at the address, or the peer stopped answering
    │   │   └── LeaseEnded          the seed, or the fork, has ended the lease: seen by transports alone
    │   ├── PeerRefused             the peer refused the request
    │   │   └── SeedAsleep          the seed is suspended: its memory may not be there
    │   └── ProtocolError           the peer is no tensorfork seed of our version, or broke the protocol
    └── the copy's
        ├── TransferFailed          the transfer of bytes failed
        ├── VerificationFailed      the bytes that arrived are not the seed's
        ├── SeedChanged             the seed's weights changed during the copy
        └── SeedMoved               the seed's tensors were moved, freed or replaced without its being told

On the seed itself, `Seed.suspend` raises MemoryInUse where somebody can still reach the memory.

docs/errors.md tells for each the state in which it leaves the model.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

_LISTED, _LONGEST_LINE = 20, 500
"""Lines of a message for each kind of difference, and characters of a line."""
_EMPTY: Mapping[str, str] = {}
Ranges: TypeAlias = Mapping[str, tuple[tuple[int, int], ...]]
_NO_RANGES: Ranges = {}


class TensorForkError(Exception):
    """Base of every error of this library.

    All of them can be pickled and copied, with their attributes and notes; as with any exception, their cause and
    traceback stay behind.

    Attributes:
        trace: the trace id of the fork that failed, as 32 hexadecimal digits; None where none had begun.
    """

    trace: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls the class with `args`, which is the message alone and not what `__init__` takes.
        return _restore, (type(self), self.args), dict(vars(self))


def _restore(kind: type[TensorForkError], args: tuple[Any, ...]) -> TensorForkError:
    return kind.__new__(kind, *args)


class UnsupportedTensor(TensorForkError, TypeError):
    """A tensor that cannot be forked: sparse, quantized, without memory, ... The message names it."""


class IdentityMismatch(TensorForkError):
    """The seed holds another model, or another part of it. Nothing was copied; the model is untouched.

    Attributes:
        fields: by the name of each field that differs, the seed's value and ours; None if it was not given.
    """

    def __init__(self, peer: str, fields: Mapping[str, tuple[object, object]]) -> None:
        self.fields = dict(fields)
        lines = [f"{name}: {theirs!r} in the seed, {ours!r} here" for name, (theirs, ours) in self.fields.items()]
        super().__init__(
            f"{peer}: the seed is not the same as this instance; nothing was copied. Fork from another seed, or give "
            "both sides the same identity= and rank= if they are what was wrong:\n  " + "\n  ".join(lines)
        )


class VersionMismatch(TensorForkError):
    """The seed has another version of the weights than `version=` or `at_least=` asked for.

    Nothing was copied; unless it is the content that differs, which only the digests show. Meta models stay meta.
    """


class LayoutMismatch(TensorForkError):
    """The seed's model and ours are not the same tensors. Nothing was copied; the model is untouched.

    Where names differ by wrappers alone, such as ``_orig_mod.``, the message begins with the `rename=` that bridges
    them. It lists twenty of each kind of difference; the attributes have all.

    Attributes:
        missing: names we have and the seed lacks.
        unexpected: names the seed has and we lack, as the seed has them.
        mismatched: names that both have, ours, each with the difference in words.
        renamed: by names of ours that differ from the seed's by wrappers alone, the seed's. They are among `missing`
            and `unexpected` too.
    """

    def __init__(
        self,
        *,
        missing: Sequence[str],
        unexpected: Sequence[str],
        mismatched: Sequence[tuple[str, str]],
        left_out: Collection[str] = (),
        sought: Mapping[str, str] = _EMPTY,
        renamed: Mapping[str, str] = _EMPTY,
        advice: str = "",
    ) -> None:
        """`left_out` is what the seed leaves out; `sought` has the seed's names for ours that are called otherwise
        there; `advice` says by what the names in `renamed` differ.
        """
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        self.renamed = dict(renamed)
        lines, count = self._lines(frozenset(left_out), sought)
        if self.renamed:
            names = f"{len(self.renamed):,} names differ" if len(self.renamed) > 1 else "one name differs"
            others = f"Nothing was copied. There are {count:,} other differences"
            text = (
                f"{names} only by {advice}. {others if count else 'No other difference was found; nothing was copied'}"
            )
        else:
            text = f"the seed's model is not this model ({count:,} differences); nothing was copied"
        if count:
            text += ". Build both from the same code and configuration, at the same stage of their life:\n  "
        super().__init__(text + "\n  ".join(lines))

    def _lines(self, left_out: Collection[str], sought: Mapping[str, str]) -> tuple[list[str], int]:
        """The lines of the message on what is not `renamed`, and how many differences there are."""
        explained = frozenset(self.renamed.values())
        missing = [name for name in self.missing if name not in self.renamed]
        unexpected = [name for name in self.unexpected if name not in explained]
        lines = []
        for name in missing[:_LISTED]:
            there = sought.get(name, name)
            hint = " (it leaves it out; exclude it here too, or publish it)" if there in left_out else ""
            lines.append(f"missing from the seed: {name}{f' (there {there})' * (there != name)}{hint}")
        lines += _more(missing)
        lines += [f"only in the seed: {name}" for name in unexpected[:_LISTED]] + _more(unexpected)
        lines += [f"{name}: {why}" for name, why in self.mismatched[:_LISTED]] + _more(self.mismatched)
        cut = [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..." for line in lines]
        return cut, len(missing) + len(unexpected) + len(self.mismatched)


def _more(differences: Sequence[object]) -> list[str]:
    """A line that counts the differences that are not listed, if there are any."""
    return [f"... and {len(differences) - _LISTED:,} more of these"] if len(differences) > _LISTED else []


class ValueMismatch(TensorForkError):
    """Plain values of the model are not the seed's, and may not differ, or cannot be taken over.

    Raised for `values="strict"`, or a `ValuePolicy`. Nothing was copied; the model is untouched.

    Attributes:
        names: of the values.
    """

    def __init__(self, message: str, *, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class TransportUnavailable(TensorForkError):
    """A transport cannot work here or between these two processes; the message has the reason and the remedy."""


class ResourceExhausted(TensorForkError):
    """This process got no more memory, file descriptors or threads. The cause is what the system or torch raised.

    Meta models stay meta; what was allocated is given back. Once bytes move, it is a `TransferFailed` instead.

    Attributes:
        resource: ``memory``, ``file descriptors`` or ``threads``.
    """

    def __init__(self, message: str, *, resource: str) -> None:
        super().__init__(message)
        self.resource = resource


class ForkCancelled(TensorForkError):
    """The fork was cancelled: `cancel=` was set. Before the first byte the model is untouched.

    After it, tensors filled in place hold some new and some old bytes; meta ones stay meta.

    Attributes:
        complete: names of the tensors whose bytes have all arrived (not verified); none if no copy had begun.
        undrained: as in `TransferFailed`.
    """

    def __init__(
        self,
        message: str,
        *,
        complete: Sequence[str] = (),
        undrained: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(message)
        self.complete = tuple(complete)
        self.undrained = tuple(undrained)


class PeerUnreachable(TensorForkError):
    """Nothing answered at the address, or the peer stopped answering; the message has the address and the step."""


class LeaseEnded(PeerUnreachable):
    """The lease has ended. Raised by a lease's channel, to transports; a fork asks the seed why, and raises that."""


class PeerRefused(TensorForkError):
    """The peer refused the request; the message has its reason."""


class SeedAsleep(PeerRefused):
    """The seed is suspended (`Seed.suspend`). Not everything was copied. Wait with `wait=`, or ask another seed."""


class ProtocolError(TensorForkError):
    """The peer is not a tensorfork seed of our version, or broke the protocol."""


class TransferFailed(TensorForkError):
    """The transfer failed. Tensors filled in place hold some new and some old bytes; meta ones stay meta.

    Attributes:
        complete: names of the tensors whose bytes have all arrived (not verified).
        undrained: ranges of our memory, as (address, nbytes), that the transport's library may still write. They are
            kept alive until it has stopped; do not use them.
    """

    def __init__(
        self,
        message: str,
        *,
        complete: Sequence[str] = (),
        undrained: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(message)
        self.complete = tuple(complete)
        self.undrained = tuple(undrained)


class VerificationFailed(TensorForkError):
    """What arrived differs from what the seed holds. Do not use the model. Meta models stay meta.

    Attributes:
        tensors: names of the tensors whose digests differ.
        ranges: by the names of these, the ranges of bytes, as (begin, end), outside of which a tensor is the seed's.
            They are pieces of 8 MiB, counted in the order in which the bytes lie in memory. A tensor of several pieces
            is missing here where the seed could not be asked for their digests any more, or for as many.
    """

    def __init__(self, message: str, *, tensors: Sequence[str], ranges: Ranges = _NO_RANGES) -> None:
        super().__init__(message)
        self.tensors = tuple(tensors)
        self.ranges = dict(ranges)


class SeedChanged(TensorForkError):
    """The seed's weights changed while they were copied, so what arrived may be a mix of old and new weights."""


class SeedMoved(TensorForkError):
    """The seed's tensors are not where it published them: they were moved, freed or replaced outside `Seed.updating`.

    What arrived may be other memory's bytes: do not use it. Forking again does not help; `Seed.rescan()` in the seed's
    process does. Meta models stay meta.

    Attributes:
        tensors: names of the tensors, a hundred at most.
    """

    def __init__(self, message: str, *, tensors: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.tensors = tuple(tensors)


class MemoryInUse(TensorForkError):
    """Raised by `Seed.suspend`: somebody can still read the model's memory, so it must not be unmapped yet.

    The seed stays suspended: no new fork begins. Call `suspend` again to go on waiting, or `resume`.

    Attributes:
        users: who, in words: forks with their addresses or connections, and threads of the seed's.
    """

    def __init__(self, message: str, *, users: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.users = tuple(users)
