"""Adapters of single experts, from the time when transformers kept each in a module of its own ("experts.0.w1").

Since transformers 5 a layer's experts are stacked in one parameter, gate and up projections beside each other. PEFT
converts such an adapter when it loads it (PEFT 0.21, `utils/transformers_weight_conversion.py`), and so does this file:

    gate_up_proj  A_e = [A_gate; A_up],  B_e = [B_gate 0; 0 B_up]   of twice the rank and alpha
    down_proj     A_e, B_e as they are

The families of models are those that PEFT converts, with the names that it knows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex.adapters.config import ALL_LINEAR, LoraConfig
from loraplex.adapters.patterns import find_matches
from loraplex.adapters.peft.parameters import ROUTER_PARAMETER, kind_of_parameter
from loraplex.adapters.targets import targeted_parameters
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.validation import listed

MAX_EXPERTS = 4096  # of one layer

_SINGLE = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<projection>\w+)")


@dataclass(frozen=True, kw_only=True)
class SingleExpertNames:
    """What a family of models called its experts' projections, and what a base model has now."""

    gate: str
    up: str
    down: str
    renamed: tuple[str, str] | None = None  # a part of all paths, before and now
    linear: tuple[str, ...]  # paths of the base's linear modules, but the output layer
    modules: tuple[str, ...]  # paths of all its modules
    parameters: frozenset[str]  # paths of all its parameters

    @property
    def names_now(self) -> Mapping[str, str]:
        """By the name of a former module, that of the parameter that now has its weight."""
        return {
            "gate": "gate.weight",
            self.gate: "gate_up_proj",
            self.up: "gate_up_proj",
            self.down: "down_proj",
        }

    def path_now(self, path: str) -> str:
        """The path that a module has now."""
        return path if self.renamed is None else path.replace(*self.renamed)


def names_single_experts(paths: Sequence[str]) -> list[str]:
    """Those of a file's module paths that belong to single experts."""
    return [path for path in paths if _SINGLE.fullmatch(path)]


def converted_config(config: LoraConfig, names: SingleExpertNames) -> LoraConfig:
    """The settings as PEFT changes them when it loads the adapter (`_convert_peft_config_moe`).

    Raises UnsupportedAdapterError where only one of the gate and up projections is adapted.
    """
    targets = _target_names(config, names)
    former: dict[str, str] = {}  # by target, the former module that it names
    for target in targets:
        found = next((old for old in names.names_now if target == old or target.endswith(f".{old}")), None)
        if found is not None:
            former[target] = found
    fused = {names.gate, names.up} & set(former.values())
    if len(fused) == 1:
        missing = ({names.gate, names.up} - fused).pop()
        raise UnsupportedAdapterError(
            f"target_modules has {fused.pop()!r} but not {missing!r}: this base model stacks both in gate_up_proj, "
            "which PEFT doesn't convert. Train both, or load the adapter into a base model of transformers 4."
        )
    if fused and names.down not in former.values():
        raise UnsupportedAdapterError(
            f"target_modules has {names.gate!r} and {names.up!r} but not {names.down!r}: PEFT takes the weights of "
            "gate_up_proj alone for those of a parameter inside another, and drops them. Train all three, or load the "
            "adapter into a base model of transformers 4."
        )
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    if fused:
        ranks[r".*\.gate_up_proj"] = 2 * config.r
        alphas[r".*\.gate_up_proj"] = 2 * config.lora_alpha
    parameters = {*(config.target_parameters or ()), *(names.names_now[old] for old in former.values())}
    return replace(
        config,
        target_modules=tuple(target for target in targets if target not in former),
        target_parameters=tuple(sorted(parameters)),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _target_names(config: LoraConfig, names: SingleExpertNames) -> Sequence[str]:
    """The target modules; of an expression, the last parts of the paths that it matches."""
    targets = config.target_modules
    if not isinstance(targets, str):
        return targets or ()
    if targets.lower() == ALL_LINEAR:
        return sorted({path.rpartition(".")[2] for path in names.linear} | set(names.names_now))
    paths = (*names.modules, *sorted(names.parameters))
    found = {path.rpartition(".")[2] for path in find_matches("target_modules", targets, paths)}
    for old, new in names.names_now.items():
        owners = [path.removesuffix(f".{new}") for path in paths if path.endswith(f".{new}")]
        if find_matches("target_modules", targets, [f"{owner}.{old}" for owner in owners]):
            found.add(old)
    return sorted(found)


def stacked_shapes(
    config: LoraConfig, shapes: Mapping[str, ModuleShape], names: SingleExpertNames
) -> tuple[LoraConfig, dict[str, ModuleShape]]:
    """The settings and shapes that `stacked_adapter` would give; raises what it raises, before a weight is read."""
    converted = converted_config(config, names)
    found = {}
    for path, parts in _members(tuple(shapes), converted, names).items():
        first = shapes[parts[0][0]]
        found[path] = ModuleShape(
            kind=kind_of_parameter(path) if path in names.parameters else first.kind,
            in_features=first.in_features,
            out_features=sum(shapes[part[0]].out_features for part in parts),
            num_experts=len(parts[0]),
        )
        wrong = [p for part in parts for p in part if shapes[p] != shapes[part[0]]]
        wrong += [part[0] for part in parts if shapes[part[0]].in_features != first.in_features]
        if wrong:
            raise AdapterFormatError(f"the files hold experts of different shapes, such as {listed(wrong)}.")
    return converted, found


def stacked_adapter(adapter: Adapter, names: SingleExpertNames) -> Adapter:
    """The adapter as PEFT converts it, with the weights of single experts stacked.

    Raises AdapterFormatError (experts are missing, or differ in shape or rank) and UnsupportedAdapterError.
    """
    shapes = {path: weights.shape for path, weights in adapter.layers.items()}
    config, stacked = stacked_shapes(adapter.config, shapes, names)
    ranks, scalings = config.ranks_of(tuple(stacked)), config.scalings_of(tuple(stacked))
    layers = {}
    for path, parts in _members(tuple(shapes), config, names).items():
        members = [[adapter.layers[name] for name in part] for part in parts]
        found = {weights.rank * len(parts) for part in members for weights in part}
        if found != {ranks[path]}:
            raise AdapterFormatError(
                f"the weights for {path!r} have the ranks {sorted(found)} once they are stacked, where PEFT's settings "
                f"for the whole are {ranks[path]}. Use one rank for all projections of the experts."
            )
        lora_a, lora_b = _stack(members)
        layers[path] = LoraWeights(
            kind=stacked[path].kind,
            lora_a=lora_a,
            lora_b=lora_b,
            scaling=scalings[path],
            magnitude=members[0][0].magnitude,
            num_experts=stacked[path].num_experts,
        )
    return Adapter(config=config, layers=layers, end_tokens=adapter.end_tokens)


def _members(
    paths: Sequence[str], config: LoraConfig, names: SingleExpertNames
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """By path in the base model now, the paths in the file: [projections][experts], which is one of one for most."""
    found: dict[str, tuple[tuple[str, ...], ...]] = {}
    single: dict[str, dict[str, dict[int, str]]] = {}
    for path in paths:
        match = _SINGLE.fullmatch(path)
        if match is None:
            now = names.path_now(path)
            weight = f"{now}.{ROUTER_PARAMETER}"
            is_router = weight in names.parameters and bool(targeted_parameters(config, [weight]))
            found[weight if is_router else now] = ((path,),)
            continue
        if match["projection"] not in (names.gate, names.up, names.down):
            raise AdapterFormatError(
                f"the files hold weights for {path!r}, but the projections of this base model's experts were called "
                f"{names.gate!r}, {names.up!r} and {names.down!r}."
            )
        owner = single.setdefault(names.path_now(match["owner"]), {})
        owner.setdefault(match["projection"], {})[int(match["expert"])] = path
    for path, projections in single.items():
        for parameter, parts in (("gate_up_proj", (names.gate, names.up)), ("down_proj", (names.down,))):
            if any(part in projections for part in parts):
                found[f"{path}.{parameter}"] = _in_order(path, {part: projections.get(part, {}) for part in parts})
    return found


def _in_order(owner: str, projections: Mapping[str, Mapping[int, str]]) -> tuple[tuple[str, ...], ...]:
    """The paths [projections][experts]; each projection must have all experts."""
    count = 1 + max(index for experts in projections.values() for index in experts)
    missing = [
        f"{owner}.{index}.{projection}"
        for projection, experts in projections.items()
        for index in range(min(count, MAX_EXPERTS))
        if index not in experts
    ]
    if missing or count > MAX_EXPERTS:
        raise AdapterFormatError(
            f"the files hold weights for experts of {owner!r} up to number {count - 1}, but none for "
            f"{listed(missing)}. Save the adapter again."
        )
    return tuple(tuple(experts[index] for index in range(count)) for experts in projections.values())


def _stack(members: Sequence[Sequence[LoraWeights]]) -> tuple[Tensor, Tensor]:
    """The factors of [projections][experts]: [experts * projections * rank, in], [.., out of all projections]."""
    if len(members) == len(members[0]) == 1:
        return members[0][0].lora_a, members[0][0].lora_b
    lora_a = torch.stack([torch.stack([weights.lora_a for weights in part]) for part in members], dim=1)
    parts = [torch.stack([weights.lora_b for weights in part]) for part in members]  # [experts, rank, out] each
    num_experts, rank, _ = parts[0].shape
    lora_b = parts[0].new_zeros(num_experts, len(parts) * rank, sum(part.shape[2] for part in parts))
    column = 0
    for row, part in enumerate(parts):
        lora_b[:, row * rank : (row + 1) * rank, column : column + part.shape[2]] = part
        column += part.shape[2]
    return lora_a.flatten(0, 2), lora_b.flatten(0, 1)
