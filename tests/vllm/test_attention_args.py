"""What requests ask of attention: read from their extra arguments, and refused where it can't be done."""

import json

import pytest

from loraplex.errors import RequestError, TooLargeError
from loraplex.residual import CaptureRequest, Steering
from loraplex.vllm_plugin.attention_args import MAX_CAPTURE_BYTES, MAX_SPANS, parse_attention_args
from loraplex.vllm_plugin.attention_log import MAX_BYTES, CaptureLog

NUM_HEADS = dict.fromkeys(range(4), 8)
SPAN = {"start": 2, "end": 5, "strength": 4.0}


def test_steering_and_capture_are_read_as_objects_and_as_json():
    capture = {"layers": [1, 3], "queries": 4, "reduce": "mean"}
    given = {"loraplex_steer": [SPAN, SPAN | {"layers": [1], "heads": [0, 7]}], "loraplex_capture": capture}
    args = parse_attention_args(given)
    assert args == parse_attention_args({name: json.dumps(value) for name, value in given.items()})
    assert args.steering == (
        Steering(spans=((2, 5),), strength=4.0),
        Steering(spans=((2, 5),), strength=4.0, layers=(1,), heads=(0, 7)),
    )
    expected = CaptureRequest(layers=(1, 3), queries=4, reduce="mean", budget_bytes=MAX_CAPTURE_BYTES)
    assert args.capture == expected
    assert args.layers(NUM_HEADS) == (0, 1, 2, 3)
    assert parse_attention_args({"loraplex_capture": capture}).layers(NUM_HEADS) == (1, 3)
    args.check(10, NUM_HEADS, range(4), 5)


def test_shares_are_read():
    share = {"start": 2, "end": 5, "share": 0.3, "layers": [1]}
    args = parse_attention_args({"loraplex_steer": [share, SPAN | {"share": None}]})
    assert args.steering == (
        Steering(spans=((2, 5),), share=0.3, layers=(1,)),
        Steering(spans=((2, 5),), strength=4.0),
    )
    assert args.layers(NUM_HEADS) == (0, 1, 2, 3)


@pytest.mark.parametrize("given", [None, {}, {"loraplex_scalings": 1}])
def test_others_ask_for_nothing(given):
    assert parse_attention_args(given) is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("loraplex_steer", "[{", "isn't JSON"),
        ("loraplex_steer", "[" * 70_000, "70000 characters"),
        ("loraplex_steer", "[" * 60_000, "isn't JSON"),
        ("loraplex_steer", [], "a list of 1 to 256"),
        ("loraplex_steer", [SPAN] * (MAX_SPANS + 1), "a list of 1 to 256"),
        ("loraplex_steer", [{"start": 2, "end": 5}], "strength"),
        ("loraplex_steer", [SPAN | {"text": "x"}], "heads"),
        ("loraplex_steer", [SPAN | {"share": 0.3}], "either strength or share"),
        ("loraplex_steer", [{"start": 2, "end": 5, "share": 1}], "between 0 and 1"),
        ("loraplex_steer", [{"start": 2, "end": 5, "share": "0.3"}], "between 0 and 1"),
        ("loraplex_steer", [SPAN | {"start": 1.5}], "tokens of the prompt"),
        ("loraplex_steer", [SPAN | {"strength": -1}], "at least 0"),
        ("loraplex_steer", [SPAN | {"layers": "all"}], "list of whole numbers"),
        ("loraplex_capture", {"layers": [1]}, "queries"),
        ("loraplex_capture", {"queries": 1}, "layers"),
        ("loraplex_capture", {"layers": [1], "queries": "some"}, "queries='some'"),
        ("loraplex_capture", {"layers": [1], "queries": 1, "dtype": "int8"}, "dtype"),
    ],
)
def test_what_isnt_understood_is_refused(name, value, words):
    with pytest.raises(RequestError, match=words):
        parse_attention_args({name: value})


@pytest.mark.parametrize(
    ("given", "known", "words"),
    [
        ({"loraplex_steer": [SPAN | {"end": 11}]}, range(4), r"span \(2, 11\)"),
        ({"loraplex_steer": [SPAN | {"layers": [4]}]}, range(4), r"layers \[4\]"),
        ({"loraplex_steer": [SPAN | {"heads": [8]}]}, range(4), "heads"),
        ({"loraplex_steer": [SPAN]}, [1, 2], "attention_layers"),
        ({"loraplex_capture": {"layers": [0], "queries": 1}}, [1, 2], "attention_layers"),
    ],
)
def test_what_isnt_there_is_refused(given, known, words):
    with pytest.raises(RequestError, match=words):
        parse_attention_args(given).check(10, NUM_HEADS, known, 5)


def test_capture_beyond_its_budget_is_refused_before_it_takes_memory():
    args = parse_attention_args({"loraplex_capture": {"layers": [0, 1], "queries": "all"}})
    args.check(400, NUM_HEADS, range(4), 1)
    with pytest.raises(TooLargeError, match=str(MAX_CAPTURE_BYTES)):
        args.check(100_000, NUM_HEADS, range(4), 1)


def test_log_keeps_the_newest_and_gives_each_once():
    args, log = parse_attention_args({"loraplex_capture": {"layers": [0, 1], "queries": "all"}}), CaptureLog()
    size = args.buffer(500, NUM_HEADS, 1).num_bytes
    num = MAX_BYTES // size + 1
    for i in range(num):
        log.add(f"cmpl-{i}-0-abc", args.buffer(500, NUM_HEADS, 1))
    assert log.take("cmpl-0") == []
    assert log.buffer("cmpl-0-0-abc") is None  # whose weights go nowhere from now on
    assert log.buffer("cmpl-1-0-abc") is not None
    log.feed("cmpl-1-0-abc", 3)
    (kept,) = log.take("cmpl-1")
    assert (kept["layers"], kept["heads"], kept["query_positions"]) == ([0, 1], list(range(8)), [0, 1, 2])
    assert log.take("cmpl-1") == []
