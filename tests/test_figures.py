"""The script that fills the documentation's figures: every result file becomes its table."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts.draw_speed import PICTURE, panels
from scripts.update_figures import (
    BASELINES,
    DOCUMENTS,
    FILES,
    QUALITY,
    RESULTS,
    figures,
    fill,
    missing,
    quality,
    updated,
)

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "cpu": "A CPU",
    "cores": 2,
    "commit": "abc",
    "date": "2026-01-01",
    "versions": {"loraplex": "0.1.0", "peft": "0.21.2"},
}
SIDE = {"tokens_per_s": 120.4, "median_batch_s": 2.0, "max_batch_s": 3.5}
STAGE = {"base_peak": 1_000_000_000, "peak": 1_100_000_000, "added_per_adapter_byte": 1.01}
WAITS = {"p50": 0.25, "p99": 2.5}
# What each benchmark writes, and a line of the table that shows it.
SAMPLES: dict[str, tuple[Any, str]] = {
    "mixed_batch": (
        [{"dtype": "float32", "rows": 8, "tokens_per_s": {"base": 100, "peft": 40, "loraplex": 90}}],
        "| float32, 8 rows, 8 adapters | 100 | 40 | 90 | 2.25x | 0.90x |",
    ),
    "training": (
        [
            {
                "model": "135m",
                "dtype": "bfloat16",
                "batch_size": 4,
                "tokens_per_s": {
                    "peft": 100,
                    "peft_eager": 200,
                    "peft_16_bit_adapters": 250,
                    "loraplex": 500,
                    "loraplex_packed": 600,
                },
            }
        ],
        "| SmolLM2-135M, bfloat16, batch size 4 | 100 | 200 | 250 | 500 | 600 | 2.50x | 3.00x |",
    ),
    "training_service": (
        {
            "clients": [{"clients": 4, "tokens_per_s": {"after_another": 200, "at_once": 350}}],
            "first_token": {"loaded_ms": 50.0, "new_weights_ms": 55.0},
        },
        "| 4 clients | 200 | 350 | 1.75x |",
    ),
    "moe_experts": (
        [
            {
                "dtype": "bfloat16",
                "rows": 8,
                "tokens_per_s": {"none": 600, "one for all": 550, "one each": 540, "PEFT, one for all": 45},
            }
        ],
        "| bfloat16, 8 rows | 600 | 550 | 540 | 45 | 0.90x | 12.00x |",
    ),
    "memory": (
        [{"dtype": "float32", "adapter_bytes": 99_000_000, "loaded": STAGE, "generated": STAGE}],
        "| float32, generated | 99 | 1000 | 1100 | 1.01 |",
    ),
    "zipf": (
        {"zipf": SIDE | {"found_in": {"slot": 0.25, "disk": 0.75}}, "fixed": SIDE, "ratio": 0.97},
        "| drawn from 1000, 100 fit into memory | 120 | 2.00 | 3.50 |",
    ),
    "http_overhead": (
        {"tokens_per_s": {"engine": 500.4, "http": 480.2}, "ratio": 0.9596, "tokens_per_chunk": 1.0},
        "| 32 streams of 64 tokens | 500 | 480 | 0.960 | 1.00 |",
    ),
    "tool_calls": (
        {"all": {"cases": 100, "calls": 120, "fit": 99, "cut_off": 1, "right_functions": 70, "right_calls": 30}},
        "| all | 100 | 120 | 99 | 70 | 30 |",
    ),
    "vllm_plugin": (
        {
            "without a mixture, tokens/s": {"base, batch 8": {"vllm": 64.4, "plugin": 68.4}},
            "with mixtures on, tokens/s": {"batch 8": {"base": 62.2, "plain": 26.8, "x-lora": 20.5}},
        },
        "| base, batch 8 | 64 | 68 | 1.06x |",
    ),
    "routers": (
        [
            {
                "dtype": "bfloat16",
                "rows": 8,
                "step_ms": {"arrow": 12.3},
                "of_base": {"arrow": 0.9},
                "of_one": {"arrow": 1},
            }
        ],
        "| bfloat16, 8 rows, arrow | 12.30 | 0.90x | 1.00x |",
    ),
    "linked": (
        {
            "tokens_per_s": {"nothing": 200.4, "1 row captures": 190.0},
            "ratio": {"nothing": 1.0, "1 row captures": 0.95},
        },
        "| 1 row captures | 190 | 0.95x |",
    ),
    "residuals": (
        {
            "tokens_per_s": {"nothing": 200.4, "8 rows with 8 control vectors": 198.0},
            "ratio": {"nothing": 1.0, "8 rows with 8 control vectors": 0.99},
        },
        "| 8 rows with 8 control vectors | 198 | 0.99x |",
    ),
    "residuals_1.1b": (
        {
            "tokens_per_s": {"nothing": 40.4, "8 rows steered by a factor": 38.0},
            "ratio": {"nothing": 1.0, "8 rows steered by a factor": 0.94},
        },
        "| 8 rows steered by a factor | 38 | 0.94x |",
    ),
    "adapter_kinds": (
        {
            "base model": {"behaves": 0.5, "right": 0.6},
            "LoReFT": {
                **{"behaves": 1.0, "right": 0.75, "weight": 1.0, "loss": 0.1234, "cpu_minutes": 2.06, "bytes": 691_800},
                "of_none": 0.9,
            },
            "vector": {
                **{"behaves": 0.6, "right": 0.55, "weight": 0.2, "loss": None, "cpu_minutes": 0.1, "bytes": 66_816},
                "of_none": 0.97,
            },
        },
        "| vector, weight 0.2 | 0.60 | 0.55 |  | 0.1 | 67 | 0.97x |",
    ),
    "xlora": (
        [
            {"question": "peft", "dtype": "float32", "tokens_per_s": {"peft": 2.0, "loraplex": 30.0}},
            {"question": "long", "dtype": "float32", "ms_at_50": 40.0, "ms_at_500": 44.0},
            {
                "question": "draft",
                "way": "engine",
                "dtype": "float32",
                "tokens_per_s": {"base": 40, "drafted": 30},
                "acceptance": 0.6,
            },
        ],
        "| questions of the test data, batch 1, the engine, float32 | base 40.0, drafted 30.0 "
        "| 0.75x, 60% of the drafts right |",
    ),
    "mixture_training": (
        [{"dtype": "bfloat16", "batch_size": 4, "tokens_per_s": {"peft": 100, "peft_eager": 200, "loraplex": 400}}],
        "| bfloat16, batch size 4 | 100 | 200 | 400 | 2.00x |",
    ),
    "engine_decode": (
        [{"dtype": "bfloat16", "rows": 8, "tokens_per_s": {"generate": 150, "base": 300, "mixture": 90.4}}],
        "| bfloat16, 8 rows | 150 | 300 | 90 |",
    ),
    "hostile_tenant": (
        {
            "alone": [{"p50_s": 0.05}, {"p50_s": 0.07}],
            "p99_alone_s": 0.1,
            "attacks": {"deep_json": {"p50_s": 0.08, "p99_s": 0.25, "p99_ratio": 2.5, "wrong": 1, "failures": ["x"]}},
        },
        "| deep json | 0.080 | 0.250 | 2.5x | 2 |",
    ),
    "engine_prefix": (
        {"first": 1.5, "later": 0.15, "later_of_first": 0.1, "last_at_once": 1.8},
        "| 16 requests that share 500 tokens | 1.500 | 0.150 | 0.100 | 1.800 |",
    ),
    "engine_load": (
        {
            side: {"tokens_per_s": 120.4, "first_token_s": WAITS, "turn_p99_s": [1.0, 5.0, 0.5], "requests": 80}
            for side in ("resident", "zipf")
        },
        "| 1000 on disk, by Zipf's law, 100 in memory | 120 | 0.25 | 2.50 | 1.00 | 5.00 | 80 |",
    ),
    "engine_churn": (
        {"finished": 9, "checked": 8, "cancelled": 1, "refused": 4, "replaced": 3, "unloaded": 2, "problems": []},
        "| tiny | 9 | 8 | 1 | 4 | 3 | 2 | 0 |",
    ),
    "engine_peers": (
        [
            {
                "case": "vllm:float32",
                "tokens_per_s": {"loraplex": 120.0, "vllm": 60.0},
                "versions": {"loraplex": "0.1.0", "vllm": "0.32.0"},
            }
        ],
        "| vllm 0.32.0, float32 | 60.0 | 120.0 | 2.00x |",
    ),
    "auto_choice": (
        {
            "choice": {
                name: {"questions": 90, "right": right, "right_above_floor": right, "least_score": 0.91}
                for name, right in (("quantum", 1.0), ("protein", 0.9))
            },
            "other wording": {name: {"right": 0.5} for name in ("quantum", "protein")},
            "floors": [{"floor": 0.55, "own": 1.0, "elsewhere": 0.05}],
            "methods": {"SpectR, as it is": 0.5},
            "ways": {"mean of embeddings": {"questions": 1.0, "other wording": 0.9, "other tasks": 0.5}},
            "cost": [
                {"prompt_tokens": 64, "base": 50.0, "choosing": 51.0, "named": 60.0, "auto": 111.0, "ratio": 1.02}
            ],
        },
        "| all | 180 | 0.950 |  |  |",
    ),
    "int8_quality": (
        {"int8": {"divergence": 0.00123, "same_token": 0.975}},
        "| int8 | 1.23e-03 | 97.5% |",
    ),
    "int8_speed": (
        [{"out": 64, "in": 32, "rows": 8, "us": {"bfloat16": 30.0, "int8_column": 15.0}}],
        "| 32 to 64, rows 8 | 30 (1.00x) | 15 (2.00x) |",
    ),
    "quantized_training": (
        {
            "bfloat16": {"before": 2**29, "loaded": 2**31, "peak": 2**32, "seconds_per_step": 2.0},
            "nf4": {"before": 2**29, "loaded": 2**30, "peak": 2**31, "seconds_per_step": 3.0},
        },
        "| nf4 | 1024 | 2048 | 0.50x | 0.43x |",
    ),
    "cpu_peers": (
        [
            {
                "model": "tiny",
                "job": "decode:8:adapters",
                "tokens_per_s": {"loraplex": 90.0, "transformers": 40.0, "openvino": 60.0, "openvino-int8": 100.0},
                "versions": {"loraplex": "0.1.0", "transformers": "5", "openvino": "2026", "openvino-int8": "2026"},
            }
        ],
        "| tiny, decode, 8 rows, adapters | 90 | 40 | 60 | 100 | 1.50x |",
    ),
    "kernel_choice": (
        {
            "adapters": [{"dtype": "torch.float32", "tokens_per_row": 4, "native": 10.2, "segmented": 20.0}],
            "base_product": [{"dtype": "torch.float32", "rows": 8, "torch": 30.0, "native": 15.0}],
        },
        "| torch.float32, 4 | 10 | 20 |",
    ),
}


def write_results(root: Path, name: str) -> None:
    workload = {"adapters": 1000, "host_adapters": 100, "slots": 8, "no_save": False, "ranks": [8, 16]}
    workload |= {"requests": 16, "prefix_tokens": 500, "resident": 8, "model": "tiny", "streams": 32, "tokens": 64}
    workload |= {"instructions": ["amx_bf16"]}
    content = {"environment": ENVIRONMENT, "workload": workload, "results": SAMPLES[name][0]}
    path = root / RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_every_result_file_has_a_sample_here() -> None:
    assert {file.name for file in FILES} == SAMPLES.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_result_file_becomes_its_table(name: str, tmp_path: Path) -> None:
    write_results(tmp_path, name)
    page = figures(tmp_path)
    assert SAMPLES[name][1] in page.splitlines()
    assert "Measured 2026-01-01 at commit abc on 2 cores of A CPU; loraplex 0.1.0, peft 0.21.2." in page
    assert "ranks 8 16" in page
    assert "no_save" not in page
    assert page.count("Not measured yet") == len(FILES) - 1


def test_chart_of_the_readme_shows_the_numbers_of_the_result_files(tmp_path: Path) -> None:
    (shown,) = re.findall(r"<dc:description>(.*?)</dc:description>", PICTURE.read_text(), flags=re.DOTALL)
    assert json.loads(html.unescape(shown)) == panels(), "run: python scripts/draw_speed.py"
    assert "](docs/images/speed.svg)" in (ROOT / "README.md").read_text()


def test_missing_files_are_named_in_the_pages_and_on_the_terminal(tmp_path: Path) -> None:
    for document in DOCUMENTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text((ROOT / document).read_text())
    assert missing(tmp_path) == [f"{RESULTS}/{file.name}.json" for file in FILES] + [QUALITY]
    for document in DOCUMENTS:
        page = updated(document, tmp_path)
        assert f"there is no `{RESULTS}/mixed_batch.json`" in page
        assert f"there is no `{QUALITY}`" in page


def test_block_is_replaced_and_the_rest_of_the_page_kept() -> None:
    page = "before\n<!-- figures:start -->\nold\n<!-- figures:end -->\nafter\n"
    filled = fill(page, "figures", "new")
    assert filled == "before\n<!-- figures:start -->\n\nnew\n\n<!-- figures:end -->\nafter\n"
    assert fill(filled, "figures", "new") == filled
    assert fill(page, "quality", "new") == page


def test_quality_table_has_the_adapter_the_best_other_and_the_baselines(tmp_path: Path) -> None:
    for file in (QUALITY, BASELINES):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / BASELINES).write_text((ROOT / BASELINES).read_text())
    exact = {"base": 0.25, "quantum": 0.75, "protein": 0.5}
    score = {"num_questions": 400, "majority": 0.35, "exact": exact, "among_labels": exact | {"base": 0.3}}
    (tmp_path / QUALITY).write_text(
        json.dumps({"quantum": score, "protein": score | {"exact": exact | {"protein": 0.7}}})
    )
    lines = quality(tmp_path).splitlines()
    assert "| quantum | 400 | 0.350 | 0.790 | 0.250 | 0.300 | 0.500 | **0.750** |" in lines
    assert lines[-1] == "Adapters above the n-grams: protein."
