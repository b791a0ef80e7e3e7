"""Who is asked: the base model, experts, and mixtures of them, loaded under one name each."""

from pathlib import Path

from evaluate_mixture import link

from examples.science.layout import FULL, JOINT, TRAINED, expert_folder, full_folder, mixture_folder
from examples.science.settings import DOMAINS, Settings
from loraplex import ArrowConfig, MultiLoraModel, SpectrConfig


def load_model(settings: Settings) -> MultiLoraModel:
    return MultiLoraModel.from_pretrained(settings.model, dtype=settings.dtype)


def load_column(model: MultiLoraModel, settings: Settings, column: str, domain: str | None = None) -> str | None:
    """Load what a column's rows go through, if it isn't loaded yet, and return it. `domain`: of FULL and JOINT."""
    domains = list(settings.experts)
    if column == "base":
        return None
    if column in (FULL, JOINT):
        folder = (
            full_folder(settings, str(domain)) if column == FULL else mixture_folder(settings, "X-LoRA") / str(domain)
        )
        name = f"{column.replace(' ', '-')}/{domain}"
        _load(model, name, folder)
        return name
    if column in TRAINED:
        name = f"mixture/{TRAINED[column]}"
        if name not in model.names():
            model.load_mixture(name, mixture_folder(settings, column))
        return name
    for each in domains if column not in DOMAINS else [column]:
        _load(model, each, expert_folder(settings, each))
    if column == "uniform":
        return link(domains, 1 / len(domains))
    if column in ("Arrow", "SpectR"):
        name = f"mixture/{column.lower()}"
        if name not in model.names():
            config = (ArrowConfig if column == "Arrow" else SpectrConfig)(top_k=settings.mixture.top_k)
            model.create_mixture(name, domains, config)
        return name
    return column


def _load(model: MultiLoraModel, name: str, folder: Path) -> None:
    if name not in model.names():
        model.load_adapter(name, folder)
