"""The codec by itself; the records that use it are tested where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from tests.refusals import refused
from vzip.runtime.errors import CheckpointError
from vzip.runtime.files import codec
from vzip.runtime.files.codec import OPTIONAL, Count, MisfitError, Must, Record, Scalar


@dataclass(frozen=True)
class Inner(Record):
    count: Count
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer(Record):
    inner: Inner | None
    kinds: Mapping[Literal["a", "b"], tuple[Inner, ...]]
    pair: tuple[int, str]
    free: Mapping[str, Scalar]
    even: Annotated[Count, Must(lambda value: value % 2 == 0, "an even number")]
    extra: Mapping[str, int] = field(default_factory=dict, metadata=OPTIONAL)


GOOD: dict[str, Any] = {
    "inner": None,
    "kinds": {"b": [{"count": 1, "ratio": 2}]},
    "pair": [1, "x"],
    "free": {"flag": True, "whole": 1, "part": 0.5, "text": ""},
    "even": 4,
}


def test_a_record_survives_json_with_every_type():
    outer = codec.read(Outer, GOOD)
    assert outer.kinds == {"b": (Inner(1, 2.0),)}
    assert outer.pair == (1, "x")
    assert [type(each) for each in outer.free.values()] == [bool, int, float, str]
    written = codec.write(outer)
    assert list(written) == list(GOOD)  # what is optional and empty is left out
    assert written == GOOD
    assert type(written["kinds"]["b"][0]["ratio"]) is float
    more = codec.read(Outer, GOOD | {"extra": {"n": 3}, "inner": {"count": 1, "ratio": 0.0}})
    assert codec.write(more)["extra"] == {"n": 3}
    assert codec.read(Outer, codec.write(more)) == more


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        ({"inner": {"count": 1}}, "'inner' lacks ['ratio']", "['count', 'ratio']"),
        ({"inner": {"count": True, "ratio": 1}}, "'inner.count' is True", "at least 1"),
        ({"inner": {"count": 1, "ratio": False}}, "'inner.ratio' is False", "a finite number"),
        ({"inner": {"count": 1, "ratio": 10**400}}, "'inner.ratio' is 1000", "a finite number"),
        ({"inner": []}, "'inner' is []", "an object"),
        ({"kinds": {"c": []}}, "'kinds' has the key 'c'", "'a', 'b'"),
        ({"kinds": {"a": [GOOD]}}, "'kinds.a[0]' lacks", "exactly"),
        ({"kinds": {"a": [{"count": 0, "ratio": 1}]}}, "'kinds.a[0].count' is 0", "at least 1"),
        ({"pair": [1]}, "'pair' is [1]", "a list of 2"),
        ({"pair": [1, 2]}, "'pair[1]' is 2", "a text"),
        ({"free": {"x": [1]}}, "'free.x' is [1]", "true or false or an integer"),
        ({"even": 3}, "'even' is 3", "an even number"),
        ({"even": -2}, "'even' is -2", "at least 1"),
        ({"more": 1}, "it has the unknown ['more']", "exactly"),
    ],
)
def test_says_where_a_value_stands(change, got, expected):
    with refused(MisfitError, got=f"Outer: {got}", expected=expected):
        codec.read(Outer, GOOD | change)
    reading = codec.reading("a.json", kind=CheckpointError, cause="damage", cure="make it again")
    with refused(CheckpointError, got=f"a.json: {got}", expected=expected, cause="damage"), reading:
        codec.read(Outer, GOOD | change)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "Expecting"),
        (b"\xff", "utf-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "a": 1}', "'a' stands twice"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_json_is_strict(data, said):
    with pytest.raises(ValueError, match=said):
        codec.parse(data)
