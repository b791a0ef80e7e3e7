"""Whether interventions fit a base model: its blocks, their sites, and its linear modules."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from loraplex.errors import BaseModelMismatchError, ConfigError, UnsupportedAdapterError
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.rows.order import RowOrder
from loraplex.residual.fingerprint import BaseFingerprint, check_same_base
from loraplex.residual.gates import GateResidual
from loraplex.residual.modules import Residual, SteeringVector, check_layer_numbers, check_rank
from loraplex.residual.positions import Positions
from loraplex.residual.reft import Intervention, ReftResidual, Site
from loraplex.residual.sites import BlockSites
from loraplex.validation import listed

Kept = TypeVar("Kept")


def check_intervention_fits(
    name: str,
    residual: SteeringVector | ReftResidual | GateResidual,
    identity: BaseFingerprint,
    sites: Callable[[], BlockSites],
    modules: Callable[[], AdaptableModel],
) -> None:
    """Raise BaseModelMismatchError or UnsupportedAdapterError unless a residual fits; reads no more than sizes."""
    if residual.base is not None:
        check_same_base(name, residual.base, replace(identity, num_heads=()))
    if isinstance(residual, SteeringVector):
        wrong = [n for n, vector in residual.vectors.items() if tuple(vector.shape) != (identity.hidden_size,)]
        _check_places(name, {(residual.site, block) for block in residual.vectors}, sites())
        _check_shapes(name, wrong, identity)
    elif isinstance(residual, ReftResidual):
        for own in residual.interventions:
            check_rank(own.rank, identity.hidden_size)
        wrong = [own.block for own in residual.interventions if not _is_whole(own, identity.hidden_size)]
        _check_places(name, {(own.site, own.block) for own in residual.interventions}, sites())
        _check_shapes(name, wrong, identity)
    else:
        _check_gates(name, residual, modules())


def restricted(residual: Residual, layers: Iterable[int] | None = None, positions: Positions | None = None) -> Residual:
    """A residual on some of its layers, or other tokens. Raises ConfigError where it has none of the layers."""
    if layers is not None:
        numbers = tuple(layers)
        check_layer_numbers("layers", numbers)
        if isinstance(residual, SteeringVector):
            kept = {layer: vector for layer, vector in residual.vectors.items() if layer in numbers}
            residual = replace(residual, vectors=_some(kept, residual.vectors, numbers))
        elif isinstance(residual, ReftResidual):
            own = tuple(one for one in residual.interventions if one.block in numbers)
            residual = replace(residual, interventions=_some(own, residual.layers, numbers))
        else:
            raise ConfigError("layers can be chosen of vectors and ReFT interventions only. Leave it out.")
    if positions is not None:
        if isinstance(residual, SteeringVector):
            residual = replace(residual, positions=positions)
        elif isinstance(residual, ReftResidual):
            moved = tuple(replace(one, positions=positions) for one in residual.interventions)
            residual = replace(residual, interventions=moved)
        else:
            raise ConfigError("positions can be chosen of vectors and ReFT interventions only. Leave it out.")
    return residual


def _some(kept: Kept, all_: Iterable[int], numbers: tuple[int, ...]) -> Kept:
    if not kept:
        raise ConfigError(f"layers are {list(numbers)}, of which the residual has none: it has {sorted(all_)}.")
    return kept


def _check_places(name: str, keys: set[tuple[Site, int]], sites: BlockSites) -> None:
    beyond = sorted({block for _, block in keys if not 0 <= block < sites.num_blocks})
    if beyond or not keys:
        raise BaseModelMismatchError(
            f"residual {name!r} has the layers {beyond}, which this base model doesn't have: its blocks are 0 to "
            f"{sites.num_blocks - 1}. Load the base model that it was made for, or choose layers=."
        )
    missing = sorted({site for site, block in keys if not sites.has(site, block)})
    if missing:
        raise BaseModelMismatchError(
            f"residual {name!r} acts on {missing}, which this base model's blocks don't have as one module that puts "
            "out hidden states. Use one that acts on 'block'."
        )


def _check_shapes(name: str, wrong: list[int], identity: BaseFingerprint) -> None:
    if wrong:
        raise BaseModelMismatchError(
            f"residual {name!r} has weights of other shapes than this base model needs (hidden size "
            f"{identity.hidden_size}), at the layers {sorted(set(wrong))}. Load the base model that it was made for."
        )


def _is_whole(own: Intervention, hidden_size: int) -> bool:
    factor = (own.rank, hidden_size)
    return tuple(own.r.shape) == factor and tuple(own.w.shape) == factor and tuple(own.b.shape) == (own.rank,)


def _check_gates(name: str, residual: GateResidual, adaptable: AdaptableModel) -> None:
    shapes = adaptable.shapes
    paths = [*residual.outputs, *residual.inputs]
    unknown = [path for path in paths if path not in shapes]
    if unknown or not paths:
        raise BaseModelMismatchError(
            f"residual {name!r} gates {listed(unknown) or 'nothing'}, which this base model doesn't have as linear "
            "modules. Load the base model that it was made for."
        )
    adaptable.check(paths)
    unfit = [
        path
        for path in paths
        if shapes[path].kind != "linear"
        or path == adaptable.output_module
        or adaptable.order_of(path) is not RowOrder.ROWS
    ]
    if unfit:
        raise UnsupportedAdapterError(
            f"residual {name!r} gates {listed(unfit)}; gates act on linear modules inside of blocks that see all "
            "tokens row after row. Train it on others (target_modules)."
        )
    wrong = [path for path, gate in residual.outputs.items() if tuple(gate.shape) != (shapes[path].out_features,)]
    wrong += [path for path, gate in residual.inputs.items() if tuple(gate.shape) != (shapes[path].in_features,)]
    if wrong:
        raise BaseModelMismatchError(
            f"residual {name!r} has gates of other sizes than this base model's modules, at {listed(wrong)}. Load the "
            "base model that it was made for."
        )
