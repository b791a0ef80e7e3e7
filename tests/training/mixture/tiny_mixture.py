"""A tiny model with three experts of different ranks and targets, and three small domains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.training import DataSource, MixtureTrainConfig
from loraplex.training.core.config import compose
from loraplex.training.mixture.data import MixtureData, load_mixture_data
from loraplex.training.mixture.hidden_states import HiddenStates
from loraplex.training.mixture.losses import MixtureLosses
from loraplex.training.mixture.sources import as_sources
from loraplex.training.mixture.state import MixtureState
from loraplex.training.mixture.task import MixtureTask
from tests.tiny_models import VOCAB_SIZE, random_peft_adapter, tiny_model
from tests.training.tiny_jobs import records, tiny_tokenizer, write_records

NAME = "science"
TARGETS: Sequence[tuple[str, ...]] = (
    ("q_proj", "v_proj"),
    ("q_proj", "o_proj", "up_proj", "lm_head"),
    ("embed_tokens", "down_proj", "q_proj"),
)
FORMS = ("messages", "prompt", "text")


def write_experts(folder: Path, model_name: str = "llama", targets: Sequence[Sequence[str]] = TARGETS) -> list[Path]:
    base = tiny_model(model_name)
    return [
        random_peft_adapter(base, folder / f"expert-{i}", targets=of_one, seed=i, r=2 + i, lora_alpha=4)
        for i, of_one in enumerate(targets)
    ]


def tiny_base(folder: Path, model_name: str = "llama", **options: Any) -> MultiLoraModel:
    """A tiny model whose tokenizer lies in `folder`/base."""
    base = tiny_model(model_name, **options)
    base.config.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return MultiLoraModel(base, source=folder / "base")


def tiny_mixture(folder: Path, config: XLoraConfig | None = None, **options: Any) -> MultiLoraModel:
    """The model with the mixture "science" of the experts "e0", "e1" and "e2"."""
    model = tiny_base(folder, **options)
    experts = [folder / f"expert-{i}" for i in range(len(TARGETS))]
    if not experts[0].exists():
        write_experts(folder)
    for i, path in enumerate(experts):
        model.load_adapter(f"e{i}", path)
    model.create_mixture(NAME, [f"e{i}" for i in range(len(experts))], config or XLoraConfig(), seed=1)
    return model


def tiny_sources(folder: Path, count: int = 24) -> list[DataSource]:
    return [
        DataSource(name=form, data=write_records(folder / f"{form}.jsonl", records(form, count, seed)))
        for seed, form in enumerate(FORMS)
    ]


def tiny_config(output: Path, **options: Any) -> MixtureTrainConfig:
    defaults: dict[str, Any] = {
        "output": output,
        "learning_rate": 1e-2,
        "batch_size": 6,
        "max_length": 200,
        "eval_every": 5,
        "plots": False,
        "tokens_per_forward": 250,
    }
    if "epochs" not in options:
        defaults["max_steps"] = 10
    return compose(MixtureTrainConfig, defaults | options, "mixture")


def tiny_data(sources: Sequence[DataSource], config: MixtureTrainConfig) -> MixtureData:
    return load_mixture_data("test", as_sources(sources), config, tiny_tokenizer(), VOCAB_SIZE)


def tiny_losses(
    model: MultiLoraModel, data: MixtureData, config: MixtureTrainConfig, *, fill: bool = True
) -> tuple[MixtureState, HiddenStates, MixtureLosses]:
    state = MixtureState(model, model.mixtures.get(NAME), data, config)
    task = MixtureTask(model.base, state)
    if fill:
        task.hidden_states.fill(data.needed(), lambda done, total: None)
    return state, task.hidden_states, task.losses
