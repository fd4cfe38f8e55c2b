"""Records as plain values and back: the declared fields, of exactly the declared types, and no others."""

from typing import Any
from unittest import mock

import pytest
from attrs import field, frozen
from attrs.validators import ge

from tensorfork.wire.records import Record, from_plain, to_plain


@frozen(eq=False, repr=False)
class Inner(Record):
    number: int = field(validator=ge(0))


@frozen(eq=False, repr=False)
class Outer(Record):
    text: str
    inner: Inner
    by_name: dict[str, Inner]
    anything: dict[str, Any]
    missing: bytes | None = None


OUTER = Outer("a", Inner(1), {"b": Inner(2)}, {"c": [1, {"d": None}]}, b"e")
PLAIN = {
    "text": "a",
    "inner": {"number": 1},
    "by_name": {"b": {"number": 2}},
    "anything": {"c": [1, {"d": None}]},
    "missing": b"e",
}


def test_a_record_is_its_fields_by_name_and_comes_back_equal() -> None:
    assert to_plain(OUTER) == PLAIN
    assert from_plain(Outer, PLAIN) == OUTER


def test_records_are_equal_by_kind_and_fields_and_say_what_they_are() -> None:
    assert Inner(1) == Inner(1) != Inner(2)
    assert Inner(1) != 1
    assert repr(OUTER) == (
        "Outer(text='a', inner=Inner(number=1), by_name={'b': Inner(number=2)}, anything={'c': [1, {'d': None}]}, "
        "missing=b'e')"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"text": b"a"}, "str expected, bytes came"),
        ({"text": None}, "str expected, NoneType came"),
        ({"inner": [1]}, "fields of a Inner expected, list came"),
        ({"inner": {"number": True}}, "int expected, bool came"),
        ({"inner": {"number": -1}}, "must be >= 0"),
        ({"inner": {}}, "number"),
        ({"by_name": {1: {"number": 2}}}, "str expected, int came"),
        ({"by_name": {"b": 2}}, "fields of a Inner expected, int came"),
        ({"by_name": []}, "dict expected, list came"),
        ({"anything": 1}, "dict expected, int came"),
        ({"missing": "e"}, "bytes expected, str came"),
    ],
)
def test_what_is_not_exactly_declared_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises((ValueError, TypeError), match=why):
        from_plain(Outer, PLAIN | change)


def test_fields_that_are_not_declared_are_skipped_also_in_records_within() -> None:
    """A later release may send them."""
    more = {"more": [{"b": None}], b"bytes": 1}
    within = {"inner": {"number": 1, **more}, "by_name": {"b": {"number": 2, **more}}}
    assert from_plain(Outer, {**PLAIN, **within, **more}) == OUTER


def test_a_field_that_is_missing_takes_its_default_or_is_refused_where_it_has_none() -> None:
    assert from_plain(Outer, {name: value for name, value in PLAIN.items() if name != "missing"}).missing is None
    with pytest.raises(TypeError, match="anything"):
        from_plain(Outer, {name: value for name, value in PLAIN.items() if name != "anything"})


def test_records_without_dicts_have_a_hash_and_others_may_equal_them() -> None:
    assert len({Inner(1), Inner(1), Inner(2)}) == 2
    assert Inner(1) == mock.ANY


def test_what_is_in_a_dict_of_anything_is_not_looked_at() -> None:
    strange = Inner(1)
    assert to_plain(Outer("a", Inner(1), {}, {"c": strange}))["anything"]["c"] is strange
