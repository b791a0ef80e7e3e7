"""Merge a link's adapters into the weights of their base model, and write a plain transformers model."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from loraplex.adapters.factors_alone import require_factors_alone
from loraplex.adapters.linking.adapter import Members
from loraplex.adapters.store.store import AdapterStore
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import BaseModelError
from loraplex.kernels.packed_weight import PackedWeight
from loraplex.layers.base.direct_reads import read_directly
from loraplex.layers.base.modules import adaptable_modules, weight_matrix
from loraplex.layers.merged_weight import check_mergeable, merge_weight
from loraplex.models.checkpoints.gguf_file import is_gguf_file
from loraplex.models.checkpoints.loading import load_base_model, parse_dtype, resolve_base_model
from loraplex.models.convert.link_members import find_lora, parse_link
from loraplex.models.convert.merged_folder import MergeRecord, check_merged_destination, write_merged_folder
from loraplex.models.convert.untie import check_shared, untie_weights
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.end_tokens import generation_ends
from loraplex.routing.adapter_spec import AdapterSpec, Link
from loraplex.validation import listed

WHAT = "merged into weights"


def save_merged(
    base: str | Path,
    link: AdapterSpec,
    folder: str | Path,
    adapters: Mapping[str, str | Path],  # folders or hub ids, by the names that the link has
    *,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
) -> MergeRecord:
    """Write `base` with the adapters of a link such as "a:0.7+b:0.3" in its weights: a model for transformers.

    What the link computes when it is served, up to rounding: W + sum_i w_i * delta_i in each module, in float64,
    rounded once to `dtype` ("auto": the base's own). Embedding and output layer that share their weight get one each if
    one of them is adapted. The base is loaded once and changed in place, module by module. What ends the adapters'
    answers ends those of the model (generation_config.json).

    Raises UnsupportedAdapterError for what no weights can do (mixtures, residuals, aLoRA), BaseModelError for a
    quantized base, AdapterExistsError for a folder that is there, and what reading the base and the adapters raises.
    Nothing is written then.
    """
    pairs = parse_link(link, adapters)
    to_dtype = parse_dtype(dtype)
    source = resolve_base_model(base)
    folders = {name: find_lora(name, adapters[name], WHAT) for name, _ in pairs}
    check_merged_destination(folder, [source, *folders.values()], overwrite=overwrite)
    _refuse_quantized_source(source)
    model, source = load_base_model(source)
    members = read_members(model, pairs, folders)
    to_dtype = model.dtype if isinstance(to_dtype, str) else to_dtype
    merge_into(model, members, to_dtype)
    record = MergeRecord(base=_shared(base), link=pairs, adapters={name: _shared(adapters[name]) for name, _ in pairs})
    write_merged_folder(model, source, folder, record, [*folders.values()], overwrite=overwrite)
    return record


def _shared(path_or_id: str | Path) -> str:
    """A hub id as it is; of a local folder the last part: the path means nothing on another machine."""
    return Path(path_or_id).resolve().name if os.path.exists(path_or_id) else str(path_or_id)


def read_members(base: PreTrainedModel, pairs: Link, adapters: Mapping[str, Path]) -> Members:
    """The adapters of a link, checked against the base model as when they are loaded to be served; it stays as it is.

    Raises what `MultiLoraModel.load_adapter` raises, and UnsupportedAdapterError for what can't be merged.
    """
    with MultiLoraModel(base, fast_decode=False) as model:
        for name, _ in pairs:
            model.load_adapter(name, adapters[name])
        members = [(name, weight, _without_copies(model.store, name)) for name, weight in pairs]
    for name, _, adapter in members:
        require_factors_alone(name, adapter, WHAT, dora=True)
    return members


def _without_copies(store: AdapterStore, name: str) -> Adapter:
    """An adapter without the copies of the base's own weights that PEFT writes beside adapted embeddings."""
    adapter = store.at_rest(name)
    return adapter if store.version(name).changed else replace(adapter, replaced={}, token_rows={})


def merge_into(base: PreTrainedModel, members: Members, dtype: torch.dtype | None = None) -> None:
    """Change the weights of a base model to those with the adapters in them, and all its weights to `dtype`.

    Everything is checked before anything changes: raises BaseModelError for weights that aren't plain numbers. Raises
    UnsupportedAdapterError for a merged weight that `dtype` can't hold; then the model is of no more use.
    """
    before = base.dtype
    dtype = dtype or before
    refuse_quantized(base)
    by_path: dict[str, list[tuple[float, LoraWeights]]] = {}
    for _, weight, adapter in members:
        for path, weights in adapter.layers.items():
            by_path.setdefault(path, []).append((weight, weights))
    modules = {path: base.get_submodule(path) for path in by_path}
    for path, module in modules.items():
        check_mergeable(path, module)
    check_shared(base, by_path)
    _check_read_by_modules(base, modules)
    untie_weights(base, by_path)
    for path, module in modules.items():
        # A weight that the model keeps in another dtype than its own, such as T5's in float32, stays so.
        own = weight_matrix(module).dtype
        merge_weight(path, module, by_path[path], dtype if own == before else own)
    _convert(base, before, dtype)
    _add_end_tokens(base, members)


def _check_read_by_modules(base: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    direct = read_directly(base, modules, adaptable_modules(base))
    if direct:
        raise BaseModelError(
            f"adapters can't be merged into {listed(direct)}: {type(base).__name__} reads these weights without "
            "running the modules, so that an adapter has no effect there when it is served (nor in PEFT), and would "
            "have one in the weights. Leave the modules out of target_modules, or serve the adapter."
        )


def refuse_quantized(base: PreTrainedModel) -> None:
    """Raise BaseModelError for a model whose weights aren't those that it was published with."""
    config = getattr(base.config, "quantization_config", None)
    if config is not None or getattr(base, "hf_quantizer", None) is not None:
        raise _quantized(type(base).__name__, "its weights are quantized")
    if any(isinstance(weight, PackedWeight) for weight in base.parameters()):
        raise _quantized(type(base).__name__, "its weights are in 8 bits, or packed for an engine")


def _refuse_quantized_source(source: str) -> None:
    """The same before anything is loaded."""
    if is_gguf_file(source):
        raise _quantized(source, "it is a GGUF file")
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception:  # load_base_model says what is wrong with it
        return
    if getattr(config, "quantization_config", None) is not None:
        raise _quantized(source, "its config.json has a quantization_config")


def _quantized(what: str, reason: str) -> BaseModelError:
    return BaseModelError(
        f"adapters can't be merged into {what!r}: {reason}, and merged weights would have to be rounded to it "
        "again. Give the original model."
    )


@torch.no_grad()
def _convert(base: PreTrainedModel, before: torch.dtype, dtype: torch.dtype) -> None:
    """Give the weights of the model's own dtype another, one after the other."""
    if dtype == before:
        return
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.dtype == before:
            tensor.data = tensor.data.to(dtype)
    for config in (base.config, base.config.get_text_config(decoder=True)):
        config.dtype = dtype


def _add_end_tokens(base: PreTrainedModel, members: Members) -> None:
    """What ends the adapters' answers ends those of the merged model."""
    generation = getattr(base, "generation_config", None)
    if generation is None:  # it generates nothing
        return
    before = generation_ends(base)
    ends = [token for _, _, adapter in members for token in adapter.end_tokens if token not in before]
    if ends:
        generation.eos_token_id = list(dict.fromkeys([*before, *ends]))
