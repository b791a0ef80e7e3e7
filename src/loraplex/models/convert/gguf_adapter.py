"""LoRA adapters as llama.cpp reads them: GGUF files of the type "adapter" (llama.cpp's convert_lora_to_gguf.py).

A module's factors are called "blk.0.attn_q.weight.lora_a" [rank, in] and ".lora_b" [out, rank]; what they add is
multiplied by adapter.lora.alpha / rank, or by 1 where that is 0.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.finite import require_finite
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import AdapterFormatError, BaseModelMismatchError, ConfigError, UnsupportedAdapterError
from loraplex.extras import require_extra
from loraplex.json_files import open_regular
from loraplex.models.checkpoints.gguf_names import GgufNames
from loraplex.output_files import whole_file
from loraplex.validation import listed, quoted

_ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"
_SUFFIXES = (".weight.lora_a", ".weight.lora_b")
_WRITTEN = ("config", "layers", "places", "end_tokens")  # fields of an Adapter; the last two belong to a folder


def read_gguf_adapter(file: Path, names: GgufNames, base_model_name: str | None) -> Adapter:
    """The adapter in a GGUF file, in float32, for the base model that `names` are of.

    Raises AdapterFormatError (damaged), UnsupportedAdapterError (not a LoRA) and BaseModelMismatchError.
    """
    require_extra("smollm2", "a GGUF file")
    from gguf import GGUFReader

    try:
        with open_regular(file):  # not a pipe or a device, which GGUFReader would wait for
            reader = GGUFReader(file)
        values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # gguf raises all kinds for files that are damaged
        raise AdapterFormatError(f"{file} can't be read as GGUF: {type(error).__name__}: {error}.") from error
    _check_kind(file, values, names)
    factors = _by_module(file, tensors, names)
    ranks = {path: len(lora_a) for path, (lora_a, _) in factors.items()}
    config = _config(file, values, ranks, base_model_name)
    scalings = config.scalings_of(tuple(factors))
    layers = {
        path: LoraWeights(kind="linear", lora_a=lora_a, lora_b=lora_b.t().contiguous(), scaling=scalings[path])
        for path, (lora_a, lora_b) in factors.items()
    }
    return Adapter(config=config, layers=layers)


def write_gguf_adapter(adapter: Adapter, file: Path, names: GgufNames) -> None:
    """Write `adapter` in float32, for the base model that `names` are of; `file` must not exist.

    Raises UnsupportedAdapterError for what llama.cpp's adapters don't have, and OutputError.
    """
    require_extra("smollm2", "a GGUF file")
    from gguf import GGUFType, GGUFValueType, GGUFWriter

    _check_writable(adapter, names)
    first = next(iter(adapter.layers.values()))
    alpha = adapter.config.lora_alpha
    if any(weights.scaling != alpha / weights.rank for weights in adapter.layers.values()) or alpha == 0:
        alpha = first.scaling * first.rank or 1.0  # rsLoRA, or several alphas: the rest goes into B
    with whole_file(file, lambda path: False) as temporary:
        writer = GGUFWriter(temporary, names.architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32(_ALPHA, alpha)
        if adapter.config.alora_invocation_tokens is not None:
            tokens = list(adapter.config.alora_invocation_tokens)
            writer.add_key_value(_INVOCATION, tokens, GGUFValueType.ARRAY, GGUFValueType.UINT32)
        for path, weights in adapter.layers.items():
            name = names.by_path[path]
            lora_b = names.to_file(path, weights.lora_b.t().double()) * (weights.scaling * weights.rank / alpha)
            writer.add_tensor(f"{name}.weight.lora_a", weights.lora_a.float().contiguous().numpy())
            writer.add_tensor(f"{name}.weight.lora_b", lora_b.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _check_kind(file: Path, values: Mapping[str, Any], names: GgufNames) -> None:
    kind, method = values.get("general.type"), values.get("adapter.type")
    if kind != "adapter" or method != "lora":
        raise UnsupportedAdapterError(
            f"{file} has the type {quoted(kind)} and the adapter type {quoted(method)}; a LoRA has "
            "'adapter' and 'lora'."
        )
    architecture = values.get("general.architecture")
    if architecture != names.architecture:
        raise BaseModelMismatchError(
            f"{file} is for the architecture {quoted(architecture)}, the base model's is {names.architecture!r}. Give "
            "the base model that the adapter was made for."
        )


def _by_module(file: Path, tensors: Mapping[str, Any], names: GgufNames) -> dict[str, tuple[Tensor, Tensor]]:
    """By module path, A [rank, in] and B [out, rank]."""
    paths = {f"{name}{suffix}": path for path, name in names.by_path.items() for suffix in _SUFFIXES}
    foreign = [name for name in tensors if name not in paths]
    if foreign or not tensors:
        raise BaseModelMismatchError(
            f"{file} holds {listed(foreign) or 'no tensors'}, which are no factors of this base model's linear modules "
            "(of an embedding, stacked experts, or another model)."
        )
    factors = {}
    for path in dict.fromkeys(paths[name] for name in tensors):
        pair = [tensors.get(f"{names.by_path[path]}{suffix}") for suffix in _SUFFIXES]
        if None in pair:
            raise AdapterFormatError(f"{file} has only one factor of {path!r}.")
        lora_a, lora_b = (_values(file, tensor) for tensor in pair)
        if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1]:
            raise AdapterFormatError(f"{file}: {path!r} has factors {list(lora_a.shape)} and {list(lora_b.shape)}.")
        heads = names.num_heads.get(path, 1)
        if lora_b.shape[0] % (2 * heads) and heads > 1:
            raise BaseModelMismatchError(f"{file}: {path!r} has {lora_b.shape[0]} rows, which are not {heads} heads.")
        factors[path] = (lora_a, names.from_file(path, lora_b).contiguous())
    return factors


def _values(file: Path, tensor: Any) -> Tensor:
    from gguf import dequantize

    try:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedAdapterError(f"{file}: {tensor.name!r} can't be dequantized: {error}.") from error
    require_finite(values, f"{file}: {tensor.name!r}")
    return values


def _config(file: Path, values: Mapping[str, Any], ranks: Mapping[str, int], base: str | None) -> LoraConfig:
    alpha, tokens = values.get(_ALPHA, 0.0), values.get(_INVOCATION)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(path): own for path, own in ranks.items() if own != rank}
    try:
        return LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,
            rank_pattern=others,
            alpha_pattern={} if alpha else others,
            target_modules=tuple(ranks),
            alora_invocation_tokens=tuple(map(int, tokens)) if tokens else None,
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )
    except (ConfigError, TypeError) as error:
        raise AdapterFormatError(f"{file}: {error}") from error


def _check_writable(adapter: Adapter, names: GgufNames) -> None:
    more = [field.name for field in fields(adapter) if field.name not in _WRITTEN and getattr(adapter, field.name)]
    if more:
        raise UnsupportedAdapterError(f"the adapter has {listed(more)}, which a LoRA of llama.cpp doesn't have.")
    if adapter.config.use_dora:
        raise UnsupportedAdapterError("use_dora is True, but llama.cpp has no DoRA. Train without it.")
    foreign = [path for path in adapter.layers if path not in names.by_path]
    if foreign or not adapter.layers:
        raise UnsupportedAdapterError(
            f"the adapter adapts {listed(foreign) or 'nothing'}, for which a LoRA of llama.cpp has no place with this "
            "base model. Supported: its linear modules."
        )
