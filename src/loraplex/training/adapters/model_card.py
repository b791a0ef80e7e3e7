"""The model card beside a trained LoRA: what it was trained on, how, and how well it does."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.push import CARD_FILE
from loraplex.output_files import writing
from loraplex.training.adapters.job_state import JobState
from loraplex.training.adapters.objectives import perplexity
from loraplex.training.core.config import flat_options
from loraplex.training.core.results import TrainResult

# Told by themselves, without folders.
_DATA = ("name", "data", "eval_data", "init_from", "after", "lora", "residual", "reft")
_LORA = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "lora_dropout", "rank_pattern", "alpha_pattern")


def write_card(state: JobState, result: TrainResult) -> None:
    """Write README.md into the folder of a finished LoRA. Raises OutputError."""
    path = result.folder / CARD_FILE
    with writing(path):
        path.write_text(model_card(state, result), encoding="utf-8")


def model_card(state: JobState, result: TrainResult) -> str:
    """Markdown after YAML, as the hub reads it; of files only their names are told."""
    lora = state.job.lora
    assert lora is not None, f"{state.name!r} is no LoRA, and has no model card"
    base = lora.base_model_name_or_path or "its base model"
    scores = _scores(state, result)
    title = state.name.rsplit("/", 1)[-1]
    return "\n".join(
        [
            *("---", _metadata(state, title, base, scores).to_yaml(), "---", "", f"# {title}", ""),
            f"A {_kind(state, lora)} adapter of {_told(base)}, trained with loraplex.",
            *("", "## Use", "", "```python", *_use(title, base), "```"),
            *("", "## Data", "", *_table(("", ""), _data(state, result))),
            *("", "## Settings", "", *_table(("option", "value"), _settings(state, lora))),
            *("", "## Scores", "", *_table(("", ""), {name: f"{value:.6g}" for name, value in scores.items()}), ""),
        ]
    )


def _metadata(state: JobState, title: str, base: str, scores: Mapping[str, float]) -> ModelCardData:
    data = Path(state.job.eval_data or state.job.data).name
    known = {"held-out loss": "loss", "perplexity": "perplexity", "exact match": "exact_match"}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="json",
            dataset_name=data,
            metric_type=known[name],
            metric_name=name,
            metric_value=value,
        )
        for name, value in scores.items()
        if name in known
    ]
    return ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "loraplex"],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _scores(state: JobState, result: TrainResult) -> dict[str, float]:
    """Of the weights that were written: the best evaluation where those are kept, else the last."""
    scores: dict[str, float] = {"training loss, last step": result.train_losses[-1]} if result.train_losses else {}
    if not result.eval_losses:
        return scores
    is_best = state.best is not None and result.best_step in result.eval_steps
    index = result.eval_steps.index(result.best_step or 0) if is_best else len(result.eval_losses) - 1
    scores |= {"evaluated at step": result.eval_steps[index], "held-out loss": result.eval_losses[index]}
    if state.job.loss == "cross_entropy":
        scores["perplexity"] = perplexity(result.eval_losses[index])
    if index < len(result.eval_exact):
        scores["exact match"] = result.eval_exact[index]
    return scores


def _data(state: JobState, result: TrainResult) -> dict[str, Any]:
    data, job = state.data, state.job
    told = {
        "records": f"{Path(job.data).name}, {len(data.train)} trained on",
        "held out": f"{Path(job.eval_data or job.data).name}, {len(data.held_out)} evaluated",
        "tokens trained on": f"{result.num_tokens:,}",
        "records cut on the left": result.num_truncated,
        "SHA-256 of the files": data.digest,
    }
    return told if data.held_out else {name: value for name, value in told.items() if name != "held out"}


def _settings(state: JobState, lora: LoraConfig) -> dict[str, Any]:
    options = {name: getattr(lora, name) for name in _LORA}
    options |= {name: value for name, value in flat_options(state.job).items() if name not in _DATA}
    return {**options, "steps taken": state.progress.step}


def _kind(state: JobState, lora: LoraConfig) -> str:
    kind = "DoRA" if lora.use_dora else "aLoRA" if lora.alora_invocation_tokens is not None else "LoRA"
    start = {"pissa": " (PiSSA start)", "olora": " (OLoRA start)"}.get(state.job.start, "")
    return kind + start


def _use(title: str, base: str) -> Sequence[str]:
    return (
        "from loraplex import MultiLoraModel",
        "",
        f"model = MultiLoraModel.from_pretrained({_told(base)!r})",
        f'model.load_adapter({title!r}, "this repository\'s id, or its folder")',
    )


def _told(base: str) -> str:
    """A base model's hub id, or the last part of its folder."""
    return base if _is_hub_id(base) else Path(base).name


def _is_hub_id(base: str) -> bool:
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return base.count("/") == 1 and not os.path.exists(base)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    cells = [f"| {name} | {str(value).replace('|', '&#124;').replace(chr(10), ' ')} |" for name, value in rows.items()]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *cells]
