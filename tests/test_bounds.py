"""Small files and settings can't ask for much: memory, time, and the length of a message are bounded."""

import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex import MultiLoraModel
from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.cli.job_options import READERS, read_job_file
from loraplex.cli.vector import read_pairs
from loraplex.engine.sampling.params import MAX_ANSWERS, SamplingParams
from loraplex.errors import (
    MAX_MESSAGE,
    AdapterError,
    AdapterFormatError,
    BaseModelMismatchError,
    CheckpointError,
    ConfigError,
    DatasetError,
    LoraplexError,
    RequestError,
    UnsupportedAdapterError,
)
from loraplex.json_files import MAX_SETTINGS_BYTES, parse_json, read_lines, read_text
from loraplex.residual.modules import ResidualConfig
from loraplex.training import AdapterJob, MixtureTrainConfig, OptimizerConfig, TrainConfig, train_adapters
from loraplex.training.core.checkpoint import FILE
from loraplex.training.core.config import compose
from loraplex.training.data.records import read_records
from loraplex.validation import MAX_QUOTED, is_finite, quoted
from loraplex.xlora.config import XLoraConfig
from tests.adapters.folders import SETTINGS, write_folder
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import records, tiny_job, tiny_tokenizer, write_records

MEMORY = 64 << 20
BOUND_S = 5.0


@contextmanager
def bounded() -> Iterator[None]:
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        assert time.perf_counter() - start < BOUND_S
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def model() -> MultiLoraModel:
    return MultiLoraModel(tiny_model("llama"))


def sparse_tensors(file: Path, shapes: dict[str, list[int]], dtype: str = "F32", metadata: Any = None) -> Path:
    """A safetensors file whose tensors are a hole in the file: it takes no room, and reads as zeros."""
    size = {"F32": 4, "F64": 8}[dtype]
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, shape in shapes.items():
        end = start + size * int(torch.Size(shape).numel())
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + start)
    return file


PATH = "base_model.model.model.layers.0.self_attn.q_proj"
SPARSE = [
    ({"r": 10_000_000}, {f"{PATH}.lora_A.weight": [10_000_000, 64], f"{PATH}.lora_B.weight": [64, 10_000_000]}),
    ({"r": 400_000}, {f"{PATH}.lora_A.weight": [400_000, 64], f"{PATH}.lora_B.weight": [64, 400_000]}),
    ({"r": 4}, {f"{PATH}.lora_A.weight": [4, 10**8], f"{PATH}.lora_B.weight": [64, 4]}),
    (
        {"r": 4},
        {
            f"{PATH}.lora_A.weight": [4, 64],
            f"{PATH}.lora_B.weight": [64, 4],
            f"{PATH}.base_layer.bias": [10**9],
        },
    ),
]


@pytest.mark.parametrize(("settings", "shapes"), SPARSE, ids=range(len(SPARSE)))
def test_sparse_weights_are_refused_before_they_are_read(
    model: MultiLoraModel, tmp_path: Path, settings: dict[str, Any], shapes: dict[str, list[int]]
) -> None:
    content = SETTINGS | settings | {"target_modules": ["model.layers.0.self_attn.q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    sparse_tensors(tmp_path / "adapter_model.safetensors", shapes)
    before = resident_bytes()
    with bounded(), pytest.raises(AdapterError):
        model.load_adapter("sparse", tmp_path)
    assert resident_bytes() - before < MEMORY
    assert model.names() == []


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({"xlora_depth": 4_000_000}, {"last.weight": [2, 64], "last.bias": [2]}),
        ({"xlora_size": 10**9, "xlora_depth": 2}, {"last.weight": [2, 10**9], "last.bias": [2]}),
        (
            {"xlora_size": 100_000, "xlora_depth": 3, "xlora_dropout_p": 0.1},
            {
                "inner.0.weight": [100_000, 64],
                "inner.0.bias": [100_000],
                "inner.3.weight": [100_000, 100_000],
                "inner.3.bias": [100_000],
                "last.weight": [2, 100_000],
                "last.bias": [2],
            },
        ),
        ({"hidden_size": 10**9}, {"last.weight": [2, 10**9], "last.bias": [2]}),
        ({"layerwise_scalings": True}, {"last.weight": [2 * 10**7, 64], "last.bias": [2 * 10**7]}),
    ],
    ids=["depth", "size", "depth and size", "hidden size", "layers"],
)
def test_head_that_no_mixture_of_the_base_model_can_have_is_refused_before_it_is_read(
    model: MultiLoraModel, tmp_path: Path, settings: dict[str, Any], shapes: dict[str, list[int]]
) -> None:
    content = {"hidden_size": 64, "adapters": ["a", "b"], "xlora_depth": 1, "base_model_id": "x"} | settings
    (tmp_path / "xlora_config.json").write_text(json.dumps(content))
    sparse_tensors(tmp_path / "xlora_classifier.safetensors", shapes)
    for name in "ab":
        random_peft_adapter(model.base, tmp_path / name, targets=("q_proj",))
    before = resident_bytes()
    with bounded(), pytest.raises((AdapterError, ConfigError)):
        model.load_mixture("m", tmp_path)
    assert resident_bytes() - before < MEMORY
    assert model.names() == []


def test_head_that_is_larger_than_the_base_model_is_not_made(model: MultiLoraModel, tmp_path: Path) -> None:
    model.load_adapter("a", random_peft_adapter(model.base, tmp_path / "a", targets=("q_proj",)))
    with bounded(), pytest.raises(ConfigError, match="xlora_size=100000"):
        model.create_mixture("m", ["a"], XLoraConfig(xlora_depth=4, xlora_size=100_000))
    model.unload("a")


def test_sparse_residual_is_refused_before_it_is_read(model: MultiLoraModel, tmp_path: Path) -> None:
    base = {"architecture": "LlamaForCausalLM", "hidden_size": 10**8, "vocab_size": 128, "num_heads": [4, 4]}
    settings = {"format": "loraplex-residual", "format_version": 1, "kind": "vector", "layers": [0], "base": base}
    (tmp_path / "residual_config.json").write_text(json.dumps(settings))
    sparse_tensors(tmp_path / "residual_model.safetensors", {"layers.0.vector": [10**8]})
    with bounded(), pytest.raises(BaseModelMismatchError):
        model.load_residual("r", tmp_path)


def test_sparse_checkpoint_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    content = json.dumps({"version": 1, "identity": {}, "jobs": [], "log_bytes": []})
    sparse_tensors(tmp_path / "out" / FILE, {"0.parameters": [10**9]}, metadata={"loraplex_training": content})
    before = resident_bytes()
    with pytest.raises(CheckpointError):
        train_tiny(tmp_path, max_steps=1)
    assert resident_bytes() - before < MEMORY


def test_flipped_bits_of_a_checkpoint_are_found(tmp_path: Path) -> None:
    train_tiny(tmp_path, max_steps=1)
    file = tmp_path / "out" / FILE
    whole = file.read_bytes()
    for place in (-3, -len(whole) // 2, len(whole) // 4, 60, 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(LoraplexError):
            train_tiny(tmp_path, max_steps=1)


def test_message_is_cut_whatever_it_quotes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a_future_setting": "x" * 3_000_000})
    with pytest.raises(UnsupportedAdapterError, match="a_future_setting") as caught:
        read_adapter(folder)
    assert len(str(caught.value)) < MAX_MESSAGE
    assert len(str(LoraplexError("a" * 10**7 + "the fix"))) <= MAX_MESSAGE
    assert str(LoraplexError("a" * 10**7 + "the fix")).endswith("the fix")
    assert str(LoraplexError("short")) == "short"
    assert len(quoted({"a": "b" * 10**6})) < 2 * MAX_QUOTED
    assert quoted(10**400) == "a number of 401 digits"
    assert quoted([1]) == "[1]"


def test_a_quoted_value_costs_what_is_shown_of_it() -> None:
    class Counted:
        num_calls = 0

        def __repr__(self) -> str:
            Counted.num_calls += 1
            return "x" * 10

    assert quoted([Counted()] * 10**6).startswith("[xxxxxxxxxx, xxxx")
    assert quoted({1: ({2: [Counted()] * 10**6},) * 10**6}).endswith("...")
    assert Counted.num_calls < 2 * MAX_QUOTED
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    itself: list[Any] = []
    itself.append(itself)
    for value in (deep, itself, {"a": [10**5000]}, [b"b" * 10**7], ["a" * 10**7] * 3):
        assert len(quoted(value)) < 2 * MAX_QUOTED
    assert quoted({"a": [10**5000]}) == "{'a': [a number of 5001 digits]}"
    for value in ([], {}, (), set(), (1,), (1, "b"), {1}, frozenset([1]), {"a": [{"b": (None, 1.5)}, b"c"]}):
        assert quoted(value) == repr(value)
    while deep:  # freed level by level
        deep = deep[0]


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e39, float("nan"), float("inf"), True, "1", None])
def test_number_that_float32_cannot_hold_is_no_number(value: object) -> None:
    assert not is_finite(value)


HUGE = 10**400
SETTINGS_OF: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (LoraConfig, {"lora_alpha": HUGE}),
    (LoraConfig, {"lora_alpha": 1e300}),
    (LoraConfig, {"r": HUGE}),
    (LoraConfig, {"lora_dropout": HUGE}),
    (LoraConfig, {"alpha_pattern": {"q": HUGE}}),
    (LoraConfig, {"alora_invocation_tokens": (HUGE,)}),
    (LoraConfig, {"layers_to_transform": (HUGE,)}),
    (ResidualConfig, {"alpha": HUGE}),
    (ResidualConfig, {"r": HUGE}),
    *((XLoraConfig, {name: HUGE}) for name in ("xlora_depth", "xlora_size", "softmax_temperature")),
    *((XLoraConfig, {name: HUGE}) for name in ("xlora_dropout_p", "scaling_pass_value", "global_scaling_weight")),
    (XLoraConfig, {"softmax_temperature": 1e-40}),
]


@pytest.mark.parametrize(("make", "options"), SETTINGS_OF, ids=lambda value: str(value)[:40])
def test_number_out_of_range_is_refused_by_name(make: Callable[..., object], options: dict[str, Any]) -> None:
    with bounded(), pytest.raises(ConfigError, match=next(iter(options))):
        make(**options)


@pytest.mark.parametrize("value", [HUGE, -1])
@pytest.mark.parametrize(
    "option",
    [
        *("learning_rate", "warmup_steps", "weight_decay", "max_steps", "batch_size", "gradient_accumulation"),
        *("max_grad_norm", "seed", "max_length", "patience", "eval_every", "eval_fraction", "eval_records"),
    ],
)
def test_training_setting_out_of_range_is_refused_by_name(tmp_path: Path, option: str, value: int) -> None:
    lora = LoraConfig(target_modules=("q_proj",))
    options: dict[str, Any] = {"max_steps": 1, option: value}
    with pytest.raises(ConfigError, match=option):
        compose(AdapterJob, {"name": "j", "data": "d.jsonl", "lora": lora} | options, "job")
    with pytest.raises(ConfigError, match=option):
        compose(MixtureTrainConfig, {"output": tmp_path} | options, "mixture")


def test_learning_rate_that_nothing_is_learnt_with_is_refused() -> None:
    for rate in (101, 1e10, 1e30):
        with pytest.raises(ConfigError, match="learning_rate is"):
            OptimizerConfig(learning_rate=rate)


def test_answers_of_one_request_are_bounded() -> None:
    assert SamplingParams(n=MAX_ANSWERS).n == MAX_ANSWERS
    with pytest.raises(RequestError, match="n is 100000"):
        SamplingParams(n=100_000)


def test_epochs_of_a_thousand_years_are_refused(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.jsonl", records("text", 24))
    for epochs in (10**18, 2 * 10**9):
        with bounded(), pytest.raises(ConfigError, match="epochs"):
            train_tiny(tmp_path, data=data, epochs=epochs)


def test_rank_that_no_module_needs_is_not_trained(tmp_path: Path) -> None:
    lora = LoraConfig(r=10**6, target_modules=("q_proj",))
    with bounded(), pytest.raises(AdapterFormatError, match="rank 1000000"):
        train_tiny(tmp_path, lora=lora)


def train_tiny(folder: Path, **options: Any) -> None:
    job, config = tiny_job(folder, "j", **options), TrainConfig(output=folder / "out", plots=False)
    train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)


@pytest.mark.parametrize("reader", [read_records, read_pairs, read_job_file], ids=lambda reader: reader.__name__)
def test_pipe_device_folder_and_endless_line_are_refused_at_once(
    tmp_path: Path, reader: Callable[[Path], object]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 40)
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/stdin"), tmp_path, tmp_path / "loop", Path("a\0b")):
        with bounded(), pytest.raises((DatasetError, ConfigError)):
            reader(path)
    with pytest.raises((DatasetError, ConfigError)):
        reader(tmp_path / "holes")


@pytest.mark.parametrize(("text", "message"), [("0-99999999999", "no list of numbers"), ("0-99999999", "too many")])
def test_spans_of_layers_are_bounded(text: str, message: str) -> None:
    with bounded(), pytest.raises(ValueError, match=message):
        READERS["layers"](text)


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text("\ufeff" + config.read_text(), encoding="utf-8")
    assert read_adapter(folder).config.r == 4
    (tmp_path / "data.jsonl").write_text('\ufeff{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    assert [record.text for record in read_records(tmp_path / "data.jsonl")] == ["a", "b"]
    assert parse_json("\ufeff[1]") == [1]
    assert read_text(tmp_path / "data.jsonl")[0] == "{"
    assert [number for number, _ in read_lines(tmp_path / "data.jsonl")] == [1, 3]


def test_settings_that_are_too_large_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_config.json").write_text(" " * (MAX_SETTINGS_BYTES + 1))
    with bounded(), pytest.raises(AdapterFormatError, match="bytes"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, 1e300), (torch.bfloat16, 1e300), (torch.float16, 1e30), (torch.bfloat16, 3.4e38)],
)
def test_weights_beyond_the_dtype_in_use_are_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    model = MultiLoraModel(tiny_model("llama", dtype=dtype))
    folder = random_peft_adapter(model.base, tmp_path / "a", targets=("q_proj",))
    adapter = read_adapter(folder)
    tensors = {}
    for path, weights in adapter.layers.items():
        lora_a = weights.lora_a.double()
        lora_a[0, 0] = value
        tensors[f"base_model.model.{path}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{path}.lora_B.weight"] = weights.lora_b.double().t().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="infinite"):
        model.load_adapter("a", folder)
    assert model.names() == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "."])
def test_link_to_itself_and_unreadable_path_are_typed(model: MultiLoraModel, tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "a")
    if name == ".":
        folder = tmp_path / "loop"
        folder.symlink_to("loop")
    else:
        (folder / name).unlink()
        (folder / name).symlink_to(name)
    for path in (folder, "a\0b", "x" * 5000, "~nobody-knows/x"):
        for load in (model.load_adapter, model.load_mixture, model.load_residual):
            with pytest.raises(LoraplexError):
                load("name", path)
