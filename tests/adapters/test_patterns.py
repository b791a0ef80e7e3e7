"""Patterns of adapters mean what they mean in PEFT, which is what Python's `re` says, in a bounded time."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.config import LoraConfig, index_pattern
from loraplex.adapters.patterns import MAX_LENGTH, MAX_SLOW, check_number_of_matches, find_matches
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.weights import ModuleShape
from loraplex.errors import AdapterFormatError, ConfigError
from tests.adapters.folders import LAYER, two_modules, write_folder

BOUND_S = 5.0
CATASTROPHE = "(.*)*(.*)*(.*)*!"

NAMES = (
    *(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 9, 10, 31) for p in "qkvo"),
    *(f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in (0, 10) for e in (0, 7) for p in ("gate", "up", "down")),
    *(f"vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)),
    *("transformer.h.0.attn.c_attn", "transformer.wte", "lm_head", "model.embed_tokens", "q_proj", "my_q_proj"),
    *("gpt_neox.layers.3.attention.query_key_value", "encoder.layer.2.attention.self.query", "a", ""),
)

PATTERNS = (
    *(r".*\.q_proj", r".*(q|k|v|o)_proj", r".*\.(?:q_proj|v_proj)", r"model\.layers\.[0-9]\..*", r".*\.\d+\..*_proj"),
    *(r"model\.layers\.(1|10)\.self_attn\.[qv]_proj", r".*self_attn.*", "q_proj", r"^model.*proj$", r"(?i).*Q_PROJ"),
    *(r".*\.layers\.(?:[0-9]|1[0-5])\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj", r".*\bq_proj\b.*", ".*"),
    *(r"^(?!.*vision).*q_proj$", r".*(?<!my_)q_proj", r"(?=.*layers).*(?:up|down)_proj", r"(?!lm_head).*", r"(?s:.*)"),
    *(r"(.*)\.layers\.(\d)\1.*", r"(?P<a>.).*(?P=a)", r".{,6}", r".{3,}?_proj", r"[^.]*", r"[[:alpha:]]+", r"(?>.*)j"),
    *(
        r".*+",
        r"\w+",
        r"[\w.]+",
        r"\S+",
        r"(?x) .* q_proj",
        r"(?:|.)*",
        r"(?:q|)_?proj",
        r"a|q_proj|",
        r"(?:a?)*",
        r"[]a]",
    ),
    *(
        r"layers",
        r"h|layers",
        r"layer(?:s)?",
        r"[a-z]+",
        r"(?:model|vision_tower\.encoder)\.layers",
        r"ex(?=perts)perts",
    ),
)

PIECES = st.sampled_from(
    [*"abq_.|*+?()[]^$-,0", ".*", r"\.", r"\d", r"\w", "(?:", "[a-z]", "[^.]", "{2}", "{1,2}", "{,2}", "*?", "proj"]
)


def by_re(pattern: str, names: tuple[str, ...], method: str) -> dict[str, str | None]:
    found = {}
    for name in names:
        matched = getattr(re, method)(pattern, name)
        if matched:
            found[name] = matched.groupdict().get("idx")
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_means_what_re_says(pattern: str) -> None:
    assert find_matches("target_modules", pattern, NAMES) == by_re(pattern, NAMES, "fullmatch")
    for built in (rf"(.*\.)?({pattern})$", index_pattern(pattern)):
        try:
            expected = by_re(built, NAMES, "match")
        except re.error:
            with pytest.raises(ConfigError, match="not a regular expression"):
                find_matches("rank_pattern", built, NAMES, "match")
            continue
        assert find_matches("rank_pattern", built, NAMES, "match") == expected


@given(pattern=st.lists(PIECES, max_size=8).map("".join), name=st.text(alphabet="abq_.0", max_size=8))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_random_pattern_means_what_re_says(pattern: str, name: str) -> None:
    for built, method in (
        (pattern, "fullmatch"),
        (rf"(.*\.)?({pattern})$", "match"),
        (index_pattern(pattern), "match"),
    ):
        try:
            expected = by_re(built, (name,), method)
        except re.error:
            with pytest.raises(ConfigError):
                find_matches("target_modules", built, (name,), method)  # type: ignore[arg-type]
            continue
        assert find_matches("target_modules", built, (name,), method) == expected  # type: ignore[arg-type]


def test_names_beyond_ascii_match_as_in_re() -> None:
    names = ("schicht.größe", "层.0.q_proj", "q_proj")
    for pattern in (r"\w+\.\w+", r".*\.\d.*", "[a-z_]+"):
        assert find_matches("target_modules", pattern, names) == by_re(pattern, names, "fullmatch")


SETTINGS_THAT_HANG: list[dict[str, Any]] = [
    {"target_modules": CATASTROPHE},
    {"exclude_modules": CATASTROPHE},
    {"rank_pattern": {CATASTROPHE: 4}},
    {"alpha_pattern": {CATASTROPHE: 4}},
    {"layers_pattern": [CATASTROPHE], "layers_to_transform": [0]},
    {"target_modules": CATASTROPHE, "ensure_weight_tying": True},
    {"rank_pattern": {f"(?!x){CATASTROPHE}": 4}},
    {"target_modules": f"(?!x){CATASTROPHE}"},
    {"alpha_pattern": {f"(?!x)({'.*' * 20})\\2!": 4}},
    {"target_modules": "(?i)" + "[\U00000101-\U0010ffff]" * 1500},  # takes minutes to compile
    {"rank_pattern": {f"(?!{i})q": 4 for i in range(1000)}},
]


@pytest.mark.parametrize("settings", SETTINGS_THAT_HANG, ids=range(len(SETTINGS_THAT_HANG)))
def test_pattern_that_takes_minutes_is_matched_or_refused_at_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_folder(tmp_path, settings)
    shapes = {
        f"model.layers.0.self_attn.{name}_proj": ModuleShape(kind="linear", in_features=16, out_features=24)
        for name in "qv"
    }
    start = time.perf_counter()
    try:
        expected_targets(read_adapter(folder).config, shapes)
    except (AdapterFormatError, ConfigError) as error:
        message = str(error)
    else:
        message = "loaded"
    assert message == "loaded" or any(option in message for option in settings)
    assert time.perf_counter() - start < BOUND_S


def test_pattern_that_only_re_knows_and_that_takes_too_long_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"target_modules holds .*look-arounds"):
        find_matches("target_modules", f"(?=m){CATASTROPHE}", NAMES)


def test_lengths_and_numbers_are_limited() -> None:
    with pytest.raises(ConfigError, match="target_modules holds a pattern of"):
        LoraConfig(target_modules="a" * (MAX_LENGTH + 1))
    with pytest.raises(ConfigError, match="rank_pattern has 5 patterns with look-arounds"):
        LoraConfig(rank_pattern={f"(?!{i})q": 4 for i in range(MAX_SLOW + 1)})
    with pytest.raises(ConfigError, match="alpha_pattern has 20000 patterns for 1000 modules"):
        check_number_of_matches("alpha_pattern", 20000, 1000)
    for unreadable in ("(" * 2000 + ")" * 2000, "a{99999999999}", "[", "(?P<idx>"):
        with pytest.raises(ConfigError, match="not a regular expression"):
            LoraConfig(target_modules=unreadable)


@pytest.mark.parametrize("name", ["x" * 780_000 + ".lora_A.weight", "lora_monteclora_sampler." * 30_000, "line\nbreak"])
def test_name_of_a_tensor_that_no_module_can_have_is_refused_at_once(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, tensors=two_modules() | {f"base_model.model.{name}": torch.ones(1)})
    start = time.perf_counter()
    with pytest.raises(AdapterFormatError, match="printable characters"):
        read_adapter(folder)
    assert time.perf_counter() - start < BOUND_S


def test_first_layers_pattern_that_matches_counts_and_one_without_number_names_no_layer() -> None:
    shape = ModuleShape(kind="linear", in_features=4, out_features=4)
    config = LoraConfig(target_modules=("q_proj",), layers_to_transform=(1,), layers_pattern=("a|b", "layers"))
    modules = {"a.layers.1.q_proj": shape, "m.layers.1.q_proj": shape, "m.layers.2.q_proj": shape}
    assert expected_targets(config, modules) == ["m.layers.1.q_proj"]  # "a" matches by itself, without an index


def test_settings_with_look_arounds_load(tmp_path: Path) -> None:
    settings = {"target_modules": r"^(?!.*vision).*\.(q|v)_proj$", "rank_pattern": {r"(?<!k)_nothing": 2}}
    config = read_adapter(write_folder(tmp_path, settings)).config
    assert config.target_modules == settings["target_modules"]
    assert config.rank_of(LAYER) == 4
