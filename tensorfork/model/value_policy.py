"""What is to be done about values that differ from the seed's, and which differ rightly."""

from collections.abc import Callable
from typing import Any

from attrs import field, frozen

from tensorfork.model.selection import Patterns, Selection

EXPECTED = (
    # a twin is put into eval() before or after the fork
    "training",
    "*.training",
    # transformers: how a model was loaded, from where, and by which release
    "*_is_hf_initialized",
    "*_use_kernels",
    "*_weight_conversions",
    "*name_or_path",
    "*_commit_hash",
    "*transformers_version",
    "*_from_model_config",
    "*_original_object_hash",
    "*config.architectures",
    "*config.model_type",
    "*config.dtype",
    "*config.torch_dtype",
    # accelerate: where it has put a model, and how it calls it
    "*hf_device_map",
    "*_hf_hook",
    "*_old_forward",
    "forward.func",
    "*.forward.func",
    # torch.compile: whether one side was compiled
    "*_compiled_call_impl",
)
"""Values that differ between models that were built rightly, in one process by loading and in the other on meta.

Found by experiment: `tests/fork/test_values_real_models.py` builds such pairs.
"""

REPORT, STRICT, IGNORE = WORDS = ("report", "strict", "ignore")


def _patterns(given: Patterns) -> tuple[str, ...]:
    return Selection(given).include or ()


def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    return Selection(patterns).selects if patterns else _none


def _none(name: str) -> bool:
    return False


def _check_word(instance: object, attribute: Any, value: object) -> None:
    if value not in WORDS:
        raise ValueError(f"values must be a ValuePolicy, or one of {', '.join(map(repr, WORDS))}, not {value!r}")


@frozen
class ValuePolicy:
    """What a fork does about plain values of the model (numbers, texts, ...) that are not the seed's.

    Patterns have the form of those of `include=`: ``*.k_scale_float`` is every value of that name.

    Attributes:
        differ: "report" has differences in the report and logs them once; "strict" raises `ValueMismatch` before
            anything is copied; "ignore" does neither.
        expected: values that differ rightly, beside those that tensorfork knows.
        take: numbers and bools that become the seed's, in the last step of the fork, all of them or none.
        takes: whether a value is one of those, by its name.
    """

    differ: str = field(default=REPORT, validator=_check_word)
    expected: tuple[str, ...] = field(default=(), converter=_patterns)
    take: tuple[str, ...] = field(default=(), converter=_patterns)
    _expects: Callable[[str], bool] = field(init=False, repr=False, eq=False)
    takes: Callable[[str], bool] = field(init=False, repr=False, eq=False)

    @_expects.default
    def _compile_expected(self) -> Callable[[str], bool]:
        return _matcher((*EXPECTED, *self.expected))

    @takes.default
    def _compile_take(self) -> Callable[[str], bool]:
        return _matcher(self.take)

    @classmethod
    def of(cls, given: "str | ValuePolicy") -> "ValuePolicy":
        """The policy that `values=` means. Raises `ValueError` for an unknown word."""
        return given if isinstance(given, ValuePolicy) else cls(given)

    @property
    def compares(self) -> bool:
        """Whether the seed's values are needed at all."""
        return self.differ != IGNORE or bool(self.take)

    def expects(self, name: str) -> bool:
        """Whether a value may differ."""
        return self._expects(name)
