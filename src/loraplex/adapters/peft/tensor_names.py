"""From the names that tensors have in an adapter's file to PEFT's own, for the base model at hand.

Files are written by PEFT, by `torch.save(model.state_dict())`, and for versions of a base model whose modules were
called otherwise. A name is brought into PEFT's form, "base_model.model.<module path>.<part>"; then, where the modules
aren't those of the base, one of its renamings is applied if it makes all of them fit.
"""

import re
from collections.abc import Iterable, Mapping

from loraplex.adapters.peft.base_layout import BaseLayout, Renaming
from loraplex.adapters.tensor_file import TensorFile
from loraplex.errors import AdapterFormatError

PREFIX = "base_model.model."

_FACTORS = {
    "lora_A.weight": ("linear", "in"),
    "lora_B.weight": ("linear", "out"),
    "lora_embedding_A": ("embedding", "in"),
    "lora_embedding_B": ("embedding", "out"),
}
# A state dict has the adapter's name in each: lora_A.default.weight, lora_embedding_A.default.
_NAMED = re.compile(
    r"(?P<module>.+\.)(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"\.(?P<adapter>(?!weight$|bias$)[^.]+)(?P<end>\.weight|\.bias)?"
)
# What a model computes anew, and early versions of transformers saved: PEFT ignores it.
_BUFFERS = re.compile(r".+\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)")


def under_peft_names(file: TensorFile, layout: BaseLayout | None = None) -> TensorFile:
    """`file` with its tensors under the names that PEFT would save them under from `layout`'s base model.

    Without a layout, module paths stay as they are. Raises AdapterFormatError where two tensors get one name.
    """
    has_prefix = any(name.startswith(PREFIX) for name in file.entries)
    kept = [name for name in file.entries if _BUFFERS.fullmatch(name) is None]
    names = _unique({name: _in_peft_form(name, has_prefix) for name in kept}, file)
    if layout is not None:
        names = _fitted(file.renamed(names), names, layout)
    return file.renamed(names)


def _in_peft_form(name: str, has_prefix: bool) -> str:
    """With the prefix once, and without the adapter's name; `has_prefix` tells whether the file's names begin so."""
    path = name
    while path.startswith(PREFIX):
        path = path.removeprefix(PREFIX)
    if path == name and has_prefix:  # not of the adapter
        return name
    match = _NAMED.fullmatch(path)
    if match is not None:
        path = f"{match['module']}{match['part']}{match['end'] or ''}"
    return PREFIX + path


def _unique(new_names: Mapping[str, str], file: TensorFile) -> dict[str, str]:
    """By new name, the present one."""
    present: dict[str, str] = {}
    for name, new in new_names.items():
        if new in present:
            raise AdapterFormatError(
                f"{file.path} holds {present[new]!r} and {name!r}, which are both {new!r}: weights of two adapters, or "
                "of one twice. Keep one."
            )
        present[new] = name
    return present


def _fitted(file: TensorFile, names: dict[str, str], layout: BaseLayout) -> dict[str, str]:
    """`names` renamed so that every factor is for a module of the base model; as they are if that can't be told."""
    if _fits(file, file.entries, layout):
        return names
    fitting: list[dict[str, str]] = []
    for renaming in layout.renamings():
        renamed = {_renamed(name, renaming): name for name in file.entries}
        if len(renamed) < len(file.entries) or renamed in fitting:
            continue
        if _fits(file.renamed(renamed), renamed, layout):
            fitting.append(renamed)
    if len(fitting) != 1:
        return names
    return {new: names[name] for new, name in fitting[0].items()}


def _renamed(name: str, renaming: Renaming) -> str:
    path = name.removeprefix(PREFIX)
    return name if path == name else PREFIX + renaming(path)


def _fits(file: TensorFile, names: Iterable[str], layout: BaseLayout) -> bool:
    """Whether there are factors, and each has a side of a module of the base model."""
    sides = 0
    for name in names:
        path, part = _split(name)
        if part not in _FACTORS:
            continue
        kind, side = _FACTORS[part]
        module, shape = layout.shapes.get(path), file.entries[name].shape
        if module is None or module.kind != kind or len(shape) != 2:
            return False
        if shape[side == "in"] != (module.in_features if side == "in" else module.out_features):
            return False
        sides += 1
    return sides > 0


def _split(name: str) -> tuple[str, str]:
    """The module's path, and which of its tensors it is."""
    path = name.removeprefix(PREFIX)
    for part in _FACTORS:
        if path.endswith(f".{part}"):
            return path.removesuffix(f".{part}"), part
    return path, ""
