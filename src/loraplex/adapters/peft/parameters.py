"""Where PEFT's file has the factors of bare parameters (`target_parameters`).

PEFT wraps the module that owns a parameter, and wraps the wrapper for the next parameter of the same module, in the
order in which the module registers them (PEFT 0.21, `BaseTuner._inject_parameters` and `lora.ParamWrapper`). So the
names in the file tell the owner and a depth: "<owner>.base_layer.lora_A.weight" is of the first of two parameters,
"<owner>.lora_A.weight" of the second. Which ones they are, the configuration says.

Of E stacked experts, a rank-r adapter has A [E * r, in], expert after expert, and B [out, r * E], whose columns are
those of all experts for the first rank, then for the second (`ParamWrapper.get_delta_weight`).
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.targets import targeted_parameters
from loraplex.adapters.weights import ModuleKind
from loraplex.errors import AdapterFormatError
from loraplex.validation import listed

# In the order in which modules of transformers register them.
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
ROUTER_PARAMETER = "weight"

_WRAPPED = ".base_layer"
_OWNER = "experts"  # the name that transformers gives the owner of stacked experts


def kind_of_parameter(path: str) -> ModuleKind:
    """The kind of a parameter, which its name tells."""
    return "router" if path.rpartition(".")[2] == ROUTER_PARAMETER else "moe experts"


def parameters_in_file(config: LoraConfig, paths: Iterable[str]) -> dict[str, str]:
    """By the path that a file names ("..experts.base_layer"), the parameter's own ("..experts.gate_up_proj").

    Paths that belong to modules are left out. Raises AdapterFormatError where a module has another number of adapted
    parameters in the file than the configuration names.
    """
    if not config.target_parameters:
        return {}
    by_owner: dict[str, list[str]] = {}
    for path in paths:
        by_owner.setdefault(_owner_of(path), []).append(path)
    found: dict[str, str] = {}
    for owner, wrappers in by_owner.items():
        parameters = _parameters_of(config, owner)
        if not parameters:
            continue
        expected = wrapper_paths(parameters)
        if set(expected.values()) != set(wrappers):
            raise AdapterFormatError(
                f"the files hold weights for {listed(wrappers)}, but target_parameters names {listed(parameters)} of "
                f"{owner!r}, whose weights would be those of {listed(expected.values())}. Correct target_parameters, "
                "or save the adapter again."
            )
        found |= {wrapper: parameter for parameter, wrapper in expected.items()}
    return found


def wrapper_paths(parameters: Iterable[str]) -> dict[str, str]:
    """By parameter path, the path under which PEFT's file has its factors; `parameters` are all that are adapted."""
    by_owner: dict[str, list[str]] = {}
    for path in parameters:
        by_owner.setdefault(path.rpartition(".")[0], []).append(path)
    found: dict[str, str] = {}
    for owner, members in by_owner.items():
        members.sort(key=_place)
        found |= {path: owner + _WRAPPED * (len(members) - 1 - depth) for depth, path in enumerate(members)}
    return found


def experts_of(lora_b: Tensor, num_experts: int) -> Tensor:  # [out, rank * experts] -> [experts * rank, out]
    """PEFT's B with the rank rows of one expert beside each other."""
    num_out = lora_b.shape[0]
    return lora_b.view(num_out, -1, num_experts).permute(2, 1, 0).reshape(-1, num_out).contiguous()


def as_in_file(lora_b: Tensor, num_experts: int) -> Tensor:  # [experts * rank, out] -> [out, rank * experts]
    """The inverse of `experts_of`."""
    num_out = lora_b.shape[1]
    return lora_b.reshape(num_experts, -1, num_out).permute(2, 1, 0).reshape(num_out, -1)


def _owner_of(path: str) -> str:
    while path.endswith(_WRAPPED):
        path = path.removesuffix(_WRAPPED)
    return path


def _parameters_of(config: LoraConfig, owner: str) -> list[str]:
    """The adapted parameters of a module.

    A bare name ("down_proj") could be that of any module's parameter; it is taken for one of stacked experts.
    """
    names = config.target_parameters or ()
    if owner.rpartition(".")[2] != _OWNER:
        config = replace(config, target_parameters=tuple(name for name in names if "." in name))
    return targeted_parameters(config, [f"{owner}.{name}" for name in (*EXPERT_PARAMETERS, ROUTER_PARAMETER)])


def _place(path: str) -> int:
    name = path.rpartition(".")[2]
    return EXPERT_PARAMETERS.index(name) if name in EXPERT_PARAMETERS else len(EXPERT_PARAMETERS)
