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

LORA_BIAS = "lora_B.bias"
_TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
# What PEFT repeats of an embedding that comes whole and was resized: the adapter's weights, and the base's.
_REPEATED = r"(modules_to_save|original_module)\.(weight|bias)"
# Tensors that only training reads (VeLoRA's projections, MonteCLoRA's sampler).
_TRAINING_ONLY = r"lora_velora_embed|lora_monteclora_sampler\..+"

_NAME = re.compile(
    re.escape(PREFIX)
    + r"(?P<path>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|"
    + rf"lora_magnitude_vector(\.weight)?|(token_adapter\.)?base_layer\.(weight|bias)|{re.escape(_TOKEN_ROWS)}|"
    + rf"{_REPEATED}|{_TRAINING_ONLY})"
)
_PARAMETER = re.compile(re.escape(PREFIX) + r"(?P<path>(.+\.)?(?P<kind>weight|bias))")


@dataclass(frozen=True, kw_only=True)
class ModuleTensors:
    """The names of one module's tensors in the file."""

    kind: ModuleKind
    lora_a: str
    lora_b: str
    magnitude: str | None
    bias: str | None
    num_experts: int = 1  # stacked in both factors


@dataclass(frozen=True, kw_only=True)
class FileTensors:
    """The names of the tensors that a file must hold, by what they are for."""

    modules: Mapping[str, ModuleTensors]  # by module path
    replaced: Mapping[str, str]  # by parameter path of the base model ("lm_head.weight"), what takes its place
    token_rows: Mapping[str, str]  # by module path of an embedding


def file_tensors(file: TensorFile, config: LoraConfig, *, contents: bool = False) -> FileTensors:
    """The tensors that `file` must hold for `config`: complete pairs of the configured ranks.

    Without `contents`, weights of the base model are refused, but for copies beside an adapted module. Raises
    AdapterFormatError (unknown names, halves of pairs, wrong shapes or ranks) and UnsupportedAdapterError.
    """
    found = _group_by_module(file)
    parameters = parameters_in_file(config, found.modules)
    names_of = {parameters.get(path, path): names for path, names in found.modules.items()}
    ranks = config.ranks_of(tuple(names_of))
    kinds = {path: kind_of_parameter(path) for path in parameters.values()}
    modules = {
        path: _check_module(file, config, path, names, ranks[path], kinds.get(path)) for path, names in names_of.items()
    }
    if not contents:
        _refuse_base_weights(file.path, found.parameters, found.token_rows)
    for path, (name, is_wrapped) in found.parameters.items():
        _check_wrapped(file, path, name, modules, is_wrapped=is_wrapped)
    if not modules and not (found.parameters or found.token_rows):
        raise AdapterFormatError(f"{file.path} holds no LoRA tensors, such as '{PREFIX}<module>.lora_A.weight'.")
    replaced = {path: name for path, (name, _) in found.parameters.items()}
    return FileTensors(modules=modules, replaced=replaced, token_rows=found.token_rows)


def shape_of(file: TensorFile, tensors: ModuleTensors) -> ModuleShape:
    """The module that the tensors fit."""
    shape_a, shape_b = file.entries[tensors.lora_a].shape, file.entries[tensors.lora_b].shape
    return ModuleShape(
        kind=tensors.kind, in_features=shape_a[1], out_features=shape_b[0], num_experts=tensors.num_experts
    )


@dataclass(kw_only=True)
class _Found:
    """The names in a file, in groups."""

    modules: dict[str, dict[str, str]]  # by module path, the full name of each of its parts
    parameters: dict[str, tuple[str, bool]]  # by parameter path, the name, and whether the module is known as wrapped
    token_rows: dict[str, str]  # by module path


def _group_by_module(file: TensorFile) -> _Found:
    found = _Found(modules={}, parameters={}, token_rows={})
    unknown, repeated = [], []
    for name in file.entries:
        match, parameter = _NAME.fullmatch(name), _PARAMETER.fullmatch(name)
        if match is None and parameter is not None and "lora_" not in name:
            _add_parameter(file, found, parameter["path"], name, is_wrapped=False)
        elif match is None:
            unknown.append(name)
        elif match["part"] == _TOKEN_ROWS:
            found.token_rows[match["path"]] = name
        elif (kind := match["part"].rpartition("base_layer.")[2]) in ("weight", "bias"):
            is_wrapped = match["part"].startswith("base_layer.")
            _add_parameter(file, found, f"{match['path']}.{kind}", name, is_wrapped=is_wrapped)
        elif re.fullmatch(_REPEATED, match["part"]):
            repeated.append((f"{match['path']}.{match['part'].rpartition('.')[2]}", name))
        else:
            _add_part(file, found.modules, match, name)
    unknown += [name for path, name in repeated if path not in found.parameters]
    if unknown:
        raise AdapterFormatError(
            f"{file.path} holds tensors with unknown names: {listed(unknown)}. Known: '{PREFIX}<module>.' "
            f"followed by lora_A.weight, lora_B.weight, lora_embedding_A, lora_embedding_B or {MAGNITUDE}."
        )
    return found


def _add_part(file: TensorFile, modules: dict[str, dict[str, str]], match: re.Match[str], name: str) -> None:
    part = MAGNITUDE if match["part"].startswith(MAGNITUDE) else match["part"]
    names = modules.setdefault(match["path"], {})
    if part in names:
        raise AdapterFormatError(f"{file.path} holds both {names[part]!r} and {name!r}; keep one.")
    names[part] = name


def _add_parameter(file: TensorFile, found: _Found, path: str, name: str, *, is_wrapped: bool) -> None:
    if path in found.parameters:
        raise AdapterFormatError(f"{file.path} holds both {found.parameters[path][0]!r} and {name!r}; keep one.")
    found.parameters[path] = (name, is_wrapped)


def _check_wrapped(
    file: TensorFile, path: str, name: str, modules: Mapping[str, ModuleTensors], *, is_wrapped: bool
) -> None:
    """Raise AdapterFormatError for a base weight whose name is not that under which PEFT would look for it."""
    module, _, kind = path.rpartition(".")
    if is_wrapped != (module in modules):
        what = "has no lora_A.weight and lora_B.weight" if is_wrapped else "has factors: its own is in base_layer"
        raise AdapterFormatError(
            f"{file.path} holds {name!r}, but {module!r} {what}, so PEFT would drop it. Save the adapter again."
        )
    if is_wrapped and kind == "weight":
        tensors, shape = modules[module], file.entries[name].shape
        width = (file.entries[tensors.lora_b].shape[0], file.entries[tensors.lora_a].shape[1])
        if sorted(shape) != sorted(width):  # stored either way round, depending on the module's class
            raise AdapterFormatError(
                f"{file.path}: {name!r} has shape {list(shape)}, which doesn't fit the adapter of {module!r} "
                f"({list(width)})."
            )


def _refuse_base_weights(file: Path, parameters: Mapping[str, tuple[str, bool]], rows: Mapping[str, str]) -> None:
    """Raise UnsupportedAdapterError for weights of the base model that are more than copies of adapted modules'."""
    weights = [*rows.values(), *(name for name, is_wrapped in parameters.values() if not is_wrapped)]
    if weights:
        raise UnsupportedAdapterError(
            f"{file} holds weights of the base model itself: {listed(weights)} (a resized embedding, trained "
            "biases or modules_to_save). Supported here: LoRA weights only (load_adapter serves the others); save with "
            "PEFT's save_embedding_layers=False if the base model was not changed."
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
        bias=names.get(LORA_BIAS),
        num_experts=_num_experts(file, names[FACTORS[kind][0]], rank) if kind == "moe experts" else 1,
    )
    _check_lora_bias(file, config, path, tensors)
    _check_shapes(file, config, path, tensors, rank)
    return tensors


def _num_experts(file: TensorFile, lora_a: str, rank: int) -> int:
    """How many experts of this rank a factor holds; one where it holds no whole number."""
    shape = file.entries[lora_a].shape
    return shape[0] // rank if shape and shape[0] and shape[0] % rank == 0 else 1


def _check_lora_bias(file: TensorFile, config: LoraConfig, path: str, tensors: ModuleTensors) -> None:
    if config.contents.lora_bias != (tensors.bias is not None):
        there = "is missing" if tensors.bias is None else "is there"
        raise AdapterFormatError(
            f"{file.path}: lora_bias is {config.contents.lora_bias} but {path!r}'s {LORA_BIAS} {there}. Correct "
            "lora_bias in the configuration, or save the adapter again."
        )
    if config.contents.lora_bias and (tensors.kind == "embedding" or config.use_dora):
        what = "an embedding" if tensors.kind == "embedding" else "DoRA"
        raise UnsupportedAdapterError(
            f"{file.path}: lora_bias is true, and {path!r} is adapted with {what}, which PEFT can't combine either. "
            "Train with lora_bias=False."
        )


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
    for vector, what in ((tensors.magnitude, "magnitude"), (tensors.bias, "bias")):
        if vector is not None and file.entries[vector].shape != (shape_b[0],):
            raise AdapterFormatError(
                f"{file.path}: {vector!r} has shape {list(file.entries[vector].shape)}; "
                f"expected {[shape_b[0]]}, one {what} for each output."
            )
