"""The grammar of a row's choice, and what malformed ones get."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.errors import BatchError, LinkSyntaxError
from loraplex.routing.adapter_spec import parse_adapter_spec, parse_adapter_specs


@pytest.mark.parametrize(
    ("choice", "link"),
    [
        (None, ()),
        ("protein", (("protein", 1.0),)),
        ("protein:0.7", (("protein", 0.7),)),
        ("protein:0.7+materials:0.3", (("protein", 0.7), ("materials", 0.3))),
        ("team/a.b-c_1+x", (("team/a.b-c_1", 1.0), ("x", 1.0))),
        ("a:-1.5+b:0", (("a", -1.5), ("b", 0.0))),
        ("a:1e+2+b:1E-3", (("a", 100.0), ("b", 0.001))),
        ([("protein", 0.7), ("materials", 1)], (("protein", 0.7), ("materials", 1.0))),
    ],
)
def test_choice_is_read(choice, link):
    assert parse_adapter_spec(choice) == link


@pytest.mark.parametrize(
    "choice",
    [
        *["", "+", "a+", "+a", "a++b", "a:", "a:b", "a:nan", "a:inf", "a:1:2", ":1", "a b", "a+a:2", "x" * 129],
        *[[], [("a",)], ["a"], [("a", "x")], [("a", None)], [("a", math.inf)], [("a:b", 1.0)], [("a", 1), ("a", 2)]],
        *[3, {}],
    ],
)
def test_malformed_choice_is_refused_and_shown(choice):
    with pytest.raises(LinkSyntaxError) as error:
        parse_adapter_spec(choice)
    shown = choice if isinstance(choice, str) else choice[0] if isinstance(choice, list) and choice else choice
    assert repr(shown) in str(error.value) or repr(choice) in str(error.value)


names = st.from_regex(r"[A-Za-z0-9._/-]{1,20}", fullmatch=True)


@given(
    st.lists(
        st.tuples(names, st.floats(allow_nan=False, allow_infinity=False, width=32)),
        min_size=1,
        unique_by=lambda p: p[0],
    )
)
def test_text_and_pairs_say_the_same(pairs):
    text = "+".join(f"{name}:{weight!r}" for name, weight in pairs)
    assert parse_adapter_spec(text) == parse_adapter_spec(pairs) == tuple(pairs)


@given(st.text(alphabet="ab:+.1e-", max_size=12))
def test_any_text_is_read_or_refused_as_a_link(text):
    with contextlib.suppress(LinkSyntaxError):
        assert all(math.isfinite(weight) for _, weight in parse_adapter_spec(text))


def test_no_choices_are_base_rows():
    assert parse_adapter_specs(None, 3) == [(), (), ()]


@pytest.mark.parametrize(
    ("choices", "num_rows", "message"),
    [
        (None, 0, "empty"),
        ([], 0, "empty"),
        (["a"], 2, "1 entries"),
        ([None] * 3, 2, "3 entries"),
        ("a", 1, "not a list"),
    ],
)
def test_batch_of_wrong_length_is_refused(choices, num_rows, message):
    with pytest.raises(BatchError, match=message):
        parse_adapter_specs(choices, num_rows)
