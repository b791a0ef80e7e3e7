"""LoRA and DoRA adapters of mlx-lm: adapters.safetensors and adapter_config.json.

A layer there computes x W^T + scale * (x lora_a) lora_b (mlx_lm/tuner/lora.py): its factors are the transposes of
PEFT's, and `scale` is what alpha/r is in PEFT. Its DoRA is PEFT's, with the magnitude called m.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.finite import require_finite
from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.weight_files import MLX_FILE
from loraplex.adapters.tensor_file import TensorFile, open_tensor_file
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import read_object
from loraplex.validation import is_finite, is_whole, listed, quoted

_PARTS = ("lora_a", "lora_b", "m")
_EMBEDDINGS = ("embed_tokens", "wte", "embedding", "word_embeddings")


def is_mlx_folder(folder: Path) -> bool:
    """Whether a folder has the weights of an MLX adapter."""
    return (folder / MLX_FILE).is_file()


def read_mlx(folder: Path, *, scale: float | None = None) -> Adapter:
    """The adapter in `folder`; `scale` is in place of its settings' own.

    Raises AdapterFormatError (files missing or damaged) and UnsupportedAdapterError (layers that PEFT doesn't have, or
    a scale that can't be told).
    """
    file = folder / CONFIG_FILE
    settings = read_object(file, AdapterFormatError)
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(f"{file}: fine_tune_type is {quoted(kind)}. Supported: 'lora' and 'dora'.")
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict) or not is_whole(parameters.get("rank")):
        raise AdapterFormatError(f"{file}: lora_parameters is {quoted(parameters)}; it must have rank and scale.")
    found = _scale(parameters, file) if scale is None else scale
    with open_tensor_file(folder / MLX_FILE) as tensors:
        modules = _modules(tensors, kind == "dora")
        config = _config(settings, parameters, found, tuple(modules), file, use_dora=kind == "dora")
        layers = {path: _weights(tensors, path, config) for path in modules}
    return Adapter(config=config, layers=layers)


def _scale(parameters: Mapping[str, Any], file: Path) -> float:
    """`scale`; the first versions of mlx-lm, which also had `alpha`, multiplied it by alpha/rank."""
    scale, alpha, rank = parameters.get("scale"), parameters.get("alpha"), parameters["rank"]
    if not is_finite(scale):
        raise AdapterFormatError(f"{file}: the scale in lora_parameters is {quoted(scale)}; it must be a number.")
    assert isinstance(scale, int | float), "is_finite takes numbers alone"
    if alpha is not None and alpha != rank:
        either = f" or {scale * alpha / rank:g}" if is_finite(alpha) and rank else ""
        raise UnsupportedAdapterError(
            f"{file}: lora_parameters has scale {scale} and alpha {quoted(alpha)}. The first versions of mlx-lm took "
            f"scale * alpha / rank, later ones scale alone. Say which it is: --scale {scale:g}{either}."
        )
    return scale


def _modules(tensors: TensorFile, use_dora: bool) -> list[str]:
    """The paths of the adapted modules; raises for tensors that aren't those of linear layers."""
    parts = {name: name.rpartition(".")[::2] for name in tensors.entries}
    unknown = [name for name, (path, part) in parts.items() if not path or part not in _PARTS]
    if unknown:
        raise UnsupportedAdapterError(
            f"{tensors.path} holds {listed(unknown)}, which belong to no LoRA layer of mlx-lm: other weights were "
            "trained too, or the adapter is quantized. Supported: lora_a, lora_b and, for DoRA, m."
        )
    paths = list(dict.fromkeys(path for path, _ in parts.values()))
    embeddings = [path for path in paths if path.rpartition(".")[2] in _EMBEDDINGS]
    if embeddings:
        raise UnsupportedAdapterError(
            f"{tensors.path} adapts {listed(embeddings)}: mlx-lm's layer there also changes an output layer that "
            "shares the embedding's weights, which PEFT's doesn't. Train without it."
        )
    needed = _PARTS if use_dora else _PARTS[:2]
    for path in paths:
        there = [part for part in _PARTS if f"{path}.{part}" in tensors.entries]
        if there != list(needed):
            raise AdapterFormatError(f"{tensors.path}: {path!r} has {there}; it must have {list(needed)}.")
        shapes = [tensors.entries[f"{path}.{part}"].shape for part in needed]
        if any(len(shape) != 2 for shape in shapes[:2]):
            raise UnsupportedAdapterError(
                f"{tensors.path}: {path!r} has factors of shape {[list(shape) for shape in shapes[:2]]}, of several "
                "experts at once, which PEFT's linear layers don't have."
            )
    if not paths:
        raise AdapterFormatError(f"{tensors.path} holds no tensors.")
    return paths


def _config(
    settings: Mapping[str, Any],
    parameters: Mapping[str, Any],
    scale: float,
    paths: tuple[str, ...],
    file: Path,
    *,
    use_dora: bool,
) -> LoraConfig:
    model, rank = settings.get("model"), parameters["rank"]
    dropout: Any = parameters.get("dropout")
    try:
        return LoraConfig(
            r=rank,
            lora_alpha=scale * rank,
            target_modules=paths,
            use_dora=use_dora,
            lora_dropout=dropout if is_finite(dropout) else 0.0,
            base_model_name_or_path=model if isinstance(model, str) else None,
            task_type="CAUSAL_LM",
        )
    except ConfigError as error:
        raise AdapterFormatError(f"{file}: {error}") from error


def _weights(tensors: TensorFile, path: str, config: LoraConfig) -> LoraWeights:
    def read(part: str) -> Tensor:
        tensor = tensors.read(f"{path}.{part}")
        require_finite(tensor, f"{tensors.path}: '{path}.{part}'")
        return tensor

    lora_a, lora_b = read("lora_a"), read("lora_b")  # [in, rank], [rank, out]
    if not lora_a.shape[1] == lora_b.shape[0] == config.r:
        raise AdapterFormatError(
            f"{tensors.path}: {path!r} has factors {list(lora_a.shape)} and {list(lora_b.shape)}, but the rank is "
            f"{config.r}."
        )
    return LoraWeights(
        kind="linear",
        lora_a=lora_a.t().contiguous(),
        lora_b=lora_b,
        scaling=config.scaling_of(path),
        magnitude=read("m") if config.use_dora else None,
    )
