"""The names and shapes of the tensors in PEFT's adapter_model.safetensors, checked before any is read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.parameters import kind_of_parameter, parameters_in_file
from loraplex.adapters.peft.tensor_names import PREFIX
from loraplex.adapters.tensor_file import TensorFile
from loraplex.adapters.weights import ModuleKind, ModuleShape
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.validation import listed

# A module's two factors, [rank, in] and [out, rank].
FACTORS: Mapping[ModuleKind, tuple[str, str]] = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "moe experts": ("lora_A.weight", "lora_B.weight"),  # [experts * rank, in] and [out, rank * experts]
    "router": ("lora_A.weight", "lora_B.weight"),
}
_MODULE_KINDS: tuple[ModuleKind, ...] = ("linear", "embedding")  # that the names of the factors tell
MAGNITUDE = "lora_magnitude_vector"  # some versions of PEFT append ".weight"

# PEFT puts these copies of the base's own weights beside adapted input and output embeddings.
_BASE_COPIES = ("base_layer.weight", "base_layer.bias")
# Tensors that only training reads (VeLoRA's projections, MonteCLoRA's sampler).
_TRAINING_ONLY = r"lora_velora_embed|lora_monteclora_sampler\..+"

_NAME = re.compile(
    re.escape(PREFIX)
    + r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|"
    + rf"lora_magnitude_vector(\.weight)?|base_layer\.weight|base_layer\.bias|{_TRAINING_ONLY})"
)


@dataclass(frozen=True, kw_only=True)
class ModuleTensors:
    """The names of one module's tensors in the file."""

    kind: ModuleKind
    lora_a: str
    lora_b: str
    magnitude: str | None
    num_experts: int = 1  # stacked in both factors


def module_tensors(file: TensorFile, config: LoraConfig) -> dict[str, ModuleTensors]:
    """By module or parameter path, the tensors that `file` must hold for `config`: pairs of the configured ranks.

    Raises AdapterFormatError (unknown names, halves of pairs, wrong shapes or ranks) and
    UnsupportedAdapterError (weights of the base model among them).
    """
    found = _group_by_module(file)
    if not found:
        raise AdapterFormatError(f"{file.path} holds no LoRA tensors, such as '{PREFIX}<module>.lora_A.weight'.")
    parameters = parameters_in_file(config, found)
    found = {parameters.get(path, path): names for path, names in found.items()}
    ranks = config.ranks_of(tuple(found))
    kinds = {path: kind_of_parameter(path) for path in parameters.values()}
    return {
        path: _check_module(file, config, path, names, ranks[path], kinds.get(path)) for path, names in found.items()
    }


def shape_of(file: TensorFile, tensors: ModuleTensors) -> ModuleShape:
    """The module that the tensors fit."""
    shape_a, shape_b = file.entries[tensors.lora_a].shape, file.entries[tensors.lora_b].shape
    return ModuleShape(
        kind=tensors.kind, in_features=shape_a[1], out_features=shape_b[0], num_experts=tensors.num_experts
    )


def base_copies(file: TensorFile) -> dict[str, str]:
    """By parameter path of the base model ("lm_head.weight"), the tensors that copy its own weights."""
    copies = {}
    for path, names in _group_by_module(file).items():
        for part in names.keys() & set(_BASE_COPIES):
            copies[f"{path}.{part.removeprefix('base_layer.')}"] = names[part]
    return copies


def _group_by_module(file: TensorFile) -> dict[str, dict[str, str]]:
    """By module path, the full name of each of its parts."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for name in file.entries:
        match = _NAME.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        part = MAGNITUDE if match["part"].startswith(MAGNITUDE) else match["part"]
        names = found.setdefault(match["path"], {})
        if part in names:
            raise AdapterFormatError(f"{file.path} holds both {names[part]!r} and {name!r}; keep one.")
        names[part] = name
    _refuse_base_weights(file.path, unknown)
    if unknown:
        raise AdapterFormatError(
            f"{file.path} holds tensors with unknown names: {listed(unknown)}. Known: '{PREFIX}<module>.' "
            f"followed by lora_A.weight, lora_B.weight, lora_embedding_A, lora_embedding_B or {MAGNITUDE}."
        )
    return found


def _refuse_base_weights(file: Path, unknown: list[str]) -> None:
    weights = [name for name in unknown if "lora_" not in name and name.endswith((".weight", ".bias"))]
    if weights and all(name.startswith(PREFIX) for name in weights):
        raise UnsupportedAdapterError(
            f"{file} holds weights of the base model itself: {listed(weights)} (a resized embedding, trained "
            "biases or modules_to_save). Supported: LoRA weights only; save with PEFT's "
            "save_embedding_layers=False if the base model was not changed."
        )


def _check_module(
    file: TensorFile,
    config: LoraConfig,
    path: str,
    names: dict[str, str],
    rank: int,
    parameter: ModuleKind | None,  # the kind of a bare parameter
) -> ModuleTensors:
    kinds = [kind for kind in _MODULE_KINDS if names.keys() & set(FACTORS[kind])]
    if len(kinds) > 1:
        raise AdapterFormatError(f"{file.path}: {path!r} has the factors of a linear and of an embedding module.")
    kind: ModuleKind = parameter or (kinds[0] if kinds else "linear")
    for part in FACTORS[kind]:
        if part not in names:
            raise AdapterFormatError(
                f"{file.path}: {path!r} has {listed(list(names.values()))} but no {part}. Save the adapter again."
            )
    if kind == "embedding" and config.alora_invocation_tokens:
        raise UnsupportedAdapterError(
            f"{file.path}: {path!r} is an embedding, which aLoRA can't adapt (neither in PEFT). Train without it."
        )
    if config.use_dora != (MAGNITUDE in names):
        there = "is there" if MAGNITUDE in names else "is missing"
        raise AdapterFormatError(
            f"{file.path}: use_dora is {config.use_dora} but {path!r}'s {MAGNITUDE} {there}. Correct "
            "use_dora in the configuration, or save the adapter again."
        )
    tensors = ModuleTensors(
        kind=kind,
        lora_a=names[FACTORS[kind][0]],
        lora_b=names[FACTORS[kind][1]],
        magnitude=names.get(MAGNITUDE),
        num_experts=_num_experts(file, names[FACTORS[kind][0]], rank) if kind == "moe experts" else 1,
    )
    _check_shapes(file, config, path, tensors, rank)
    _check_base_copy(file, path, tensors, names)
    return tensors


def _num_experts(file: TensorFile, lora_a: str, rank: int) -> int:
    """How many experts of this rank a factor holds; one where it holds no whole number."""
    shape = file.entries[lora_a].shape
    return shape[0] // rank if shape and shape[0] and shape[0] % rank == 0 else 1


def _check_shapes(file: TensorFile, config: LoraConfig, path: str, tensors: ModuleTensors, rank: int) -> None:
    shape_a, shape_b = file.entries[tensors.lora_a].shape, file.entries[tensors.lora_b].shape
    for name, shape in ((tensors.lora_a, shape_a), (tensors.lora_b, shape_b)):
        if len(shape) != 2 or 0 in shape:
            raise AdapterFormatError(
                f"{file.path}: {name!r} has shape {list(shape)}; a factor has two dimensions, none of them "
                "empty. Gather the shards before saving; convolutions can't be adapted."
            )
    if not shape_a[0] == shape_b[1] == rank * tensors.num_experts:
        times = ", times the number of experts" if tensors.kind == "moe experts" else ""
        raise AdapterFormatError(
            f"{file.path}: {path!r} has rank {shape_a[0]} in its A {list(shape_a)}, {shape_b[1]} in its B "
            f"{list(shape_b)} and {rank} in the configuration (r={config.r} and rank_pattern){times}. All three "
            "must agree."
        )
    if tensors.magnitude is not None and file.entries[tensors.magnitude].shape != (shape_b[0],):
        raise AdapterFormatError(
            f"{file.path}: {tensors.magnitude!r} has shape {list(file.entries[tensors.magnitude].shape)}; "
            f"expected {[shape_b[0]]}, one magnitude for each output."
        )


def _check_base_copy(file: TensorFile, path: str, tensors: ModuleTensors, names: dict[str, str]) -> None:
    copy = names.get(_BASE_COPIES[0])
    if copy is None:
        return
    width = (file.entries[tensors.lora_b].shape[0], file.entries[tensors.lora_a].shape[1])
    shape = file.entries[copy].shape
    if sorted(shape) != sorted(width):  # stored either way round, depending on the module's class
        raise AdapterFormatError(
            f"{file.path}: {copy!r} has shape {list(shape)}, which doesn't fit the adapter of {path!r} ({list(width)})."
        )
