"""Interventions as pyreft saves them: a folder with config.json and one pickled state dict for each intervention.

pyvene names the files after places (`IntervenableModel._get_representation_key`): "intkey_layer_3_comp_block_output_
unit_pos_nunit_1#0.bin", or "intkey_comp_model_layers[3]_output_...". A second intervention at a place ("#1") is there
where first and last positions have weights of their own. Which positions those are isn't saved.
"""

import os.path
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.adapters.finite import require_finite
from loraplex.adapters.other_formats.pickled import read_pickled
from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import damaged_as, read_object
from loraplex.residual.positions import Positions
from loraplex.residual.reft import Intervention, ReftResidual, Site
from loraplex.validation import listed, quoted

CONFIG_FILE = "config.json"
MAX_FILES = 4096

# Classes of pyreft/interventions.py: whether R h is subtracted, and whether there is a W.
_FORMULAS = {
    "LoreftIntervention": (True, True),
    "NoreftIntervention": (True, True),
    "ConsreftIntervention": (True, False),
    "LobireftIntervention": (False, False),
    "DireftIntervention": (False, True),
    "NodireftIntervention": (False, True),
}
_SIZES = ("embed_dim", "interchange_dim")  # whole numbers that pyvene keeps beside the weights
_SITES: dict[str, Site] = {
    **{"block_output": "block", "mlp_output": "mlp", "attention_output": "attention"},
    **{"": "block", "mlp": "mlp", "self_attn": "attention", "attention": "attention", "attn": "attention"},
}
_KEY = re.compile(
    r"(?:layer_(?P<layer>\d{1,5})_comp_(?P<component>\w+)|comp_\w+\[(?P<index>\d{1,5})\]_?(?P<path>\w*?)_?output)"
    r"_unit_pos_nunit_\d+#(?P<number>\d)"
)


class _Place(NamedTuple):
    block: int
    site: Site
    number: int  # among the interventions there


def is_pyreft_folder(folder: str | Path) -> bool:
    """Whether a folder holds interventions of pyreft."""
    path = Path(folder)
    return os.path.isfile(path / CONFIG_FILE) and any(path.glob("intkey_*.bin"))


def read_pyreft(folder: str | Path, positions: Positions | None) -> ReftResidual:
    """The interventions in a folder, at the positions that they were trained on.

    Pickles are read without running what they may hold. Raises AdapterFormatError, UnsupportedAdapterError, or
    ConfigError where positions are missing or don't fit.
    """
    folder = Path(folder)
    if positions is None:
        raise ConfigError(
            f"{str(folder)!r} holds interventions of pyreft, which doesn't save at which positions they act. Give what "
            "they were trained with: positions='f7+l7' (--positions f7+l7), or 'l1' for the last token of the prompt."
        )
    with damaged_as(AdapterFormatError, folder):
        kinds = _kinds(folder)
        files = {key: folder / f"intkey_{key}.bin" for key in kinds}
        missing = [file.name for file in files.values() if not file.is_file()]
        extra = [file.name for file in folder.glob("intkey_*.bin") if file not in files.values()]
        if missing or extra:
            raise AdapterFormatError(
                f"{str(folder)!r} doesn't hold what its settings say: missing {listed(missing) or 'none'}, extra "
                f"{listed(extra) or 'none'}."
            )
        places = {key: _place(folder, key) for key in kinds}
        own = _own_positions(folder, list(places.values()), positions)
        made = [_intervention(files[key], kinds[key], place, own[place.number]) for key, place in places.items()]
    return ReftResidual(interventions=tuple(made))


def _kinds(folder: Path) -> dict[str, str]:
    """By key, the class of each intervention, in their order."""
    file = folder / CONFIG_FILE
    settings = read_object(file, AdapterFormatError)
    keys, types = settings.get("sorted_keys"), settings.get("intervention_types")
    representations = settings.get("representations")
    if not isinstance(keys, list) or not isinstance(types, list) or not len(types) == len(keys) <= MAX_FILES:
        raise AdapterFormatError(f"{file} doesn't list its interventions (sorted_keys, intervention_types).")
    if not isinstance(representations, list) or len(representations) != len(keys):
        raise AdapterFormatError(f"{file} has {len(keys)} keys and other representations.")
    names = [re.fullmatch(r"<class '[\w.]*?(\w+)'>", name) if isinstance(name, str) else None for name in types]
    unknown = [quoted(t) for t, name in zip(types, names, strict=True) if name is None or name[1] not in _FORMULAS]
    if unknown or not all(isinstance(key, str) for key in keys) or not keys or len(set(keys)) != len(keys):
        raise UnsupportedAdapterError(f"{file} has interventions {unknown[:3]}; known are {sorted(_FORMULAS)}.")
    return {key: name[1] for key, name in zip(keys, names, strict=True) if name is not None}


def _place(folder: Path, key: str) -> _Place:
    match = _KEY.fullmatch(key)
    named = None if match is None else match["component"] if match["layer"] else match["path"]
    if match is None or named not in _SITES:
        raise UnsupportedAdapterError(
            f"{str(folder)!r} has an intervention at {quoted(key)}; they act at positions of block_output, mlp_output "
            "or attention_output."
        )
    return _Place(int(match["layer"] or match["index"]), _SITES[named], int(match["number"]))


def _own_positions(folder: Path, places: list[_Place], positions: Positions) -> list[Positions]:
    """Of the first, and of the second intervention at a place."""
    most = max(Counter((place.block, place.site) for place in places).values())
    numbers = sorted({place.number for place in places})
    if most == 1 and numbers == [0]:
        return [positions]
    if most == 2 and numbers == [0, 1] and positions.first and positions.last:
        return [Positions("edges", first=positions.first), Positions("edges", last=positions.last)]
    raise ConfigError(
        f"{str(folder)!r} has {most} interventions at one place, and positions are {str(positions)!r}. Two are of "
        "first and of last positions, such as 'f7+l7'; more are not known."
    )


def _intervention(file: Path, kind: str, place: _Place, positions: Positions) -> Intervention:
    subtracts, has_w = _FORMULAS[kind]
    tensors = {name: tensor.detach() for name, tensor in read_pickled(file, left_out=_SIZES).items()}
    for name, tensor in tensors.items():
        require_finite(tensor, f"{file}: {name!r}")
    try:
        r, w, b = _factors(tensors, has_w=has_w, subtracts=subtracts)
    except KeyError as error:
        raise AdapterFormatError(f"{file} holds {listed(tensors)}; a {kind} has {error} too.") from None
    if r.ndim != 2 or w.shape != r.shape or b.shape != r.shape[:1]:
        raise AdapterFormatError(f"{file} has factors {list(r.shape)}, {list(w.shape)} and {list(b.shape)}.")
    return Intervention(block=place.block, site=place.site, positions=positions, r=r, w=w, b=b, subtracts=subtracts)


def _factors(tensors: dict[str, Tensor], *, has_w: bool, subtracts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """R, W and b. LoReFT's own state dict has "rotate_layer", "weight" and "bias"; the others' have torch's names.

    What NoReFT subtracts has a bias p too: b - p. An orthogonal parametrization stores what R is made of.
    """
    tensors = {name.removeprefix("learned_source."): tensor for name, tensor in tensors.items()}
    if "proj_layer.weight" in tensors:
        r = tensors["proj_layer.weight"]
    elif "rotate_layer" in tensors:
        r = tensors["rotate_layer"].t()
    elif "rotate_layer.weight" in tensors:
        r = tensors["rotate_layer.weight"].t()
    else:
        r = _orthogonal(tensors).t()
    if not has_w:
        r = r.contiguous()
        return r, torch.zeros_like(r), tensors["learned_source"]
    b = tensors["bias"]
    if subtracts and "proj_layer.bias" in tensors:
        b = b.double() - tensors["proj_layer.bias"].double()
    return r.contiguous(), tensors["weight"].contiguous(), b.to(tensors["weight"].dtype)


def _orthogonal(tensors: dict[str, Tensor]) -> Tensor:  # [hidden, rank]
    """The weight of torch.nn.utils.parametrizations.orthogonal, from what its state dict stores."""
    prefix = "rotate_layer.parametrizations.weight."
    original = tensors[f"{prefix}original"]
    if original.ndim != 2:
        raise AdapterFormatError(f"a rotation has the shape {list(original.shape)}; it is a matrix.")
    layer = torch.nn.Linear(original.shape[1], original.shape[0], bias=False, dtype=original.dtype)
    torch.nn.utils.parametrizations.orthogonal(layer)
    state = {"parametrizations.weight.original": original}
    if f"{prefix}0.base" in tensors:
        state["parametrizations.weight.0.base"] = tensors[f"{prefix}0.base"]
    layer.load_state_dict(state)
    return layer.weight.detach()
