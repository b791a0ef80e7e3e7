"""Write a link as one adapter in PEFT's format."""

from collections.abc import Mapping
from pathlib import Path

import torch

from loraplex.adapters.linking.adapter import link_adapters
from loraplex.adapters.linking.combination import Combination
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import check_adapter_destination, write_adapter
from loraplex.adapters.weights import Adapter
from loraplex.models.convert.link_members import find_lora, parse_link
from loraplex.output_files import resolved
from loraplex.routing.adapter_spec import AdapterSpec


def save_linked(
    link: AdapterSpec,
    folder: str | Path,
    adapters: Mapping[str, str | Path],  # folders or hub ids, by the names that the link has
    combination: Combination | None = None,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Write the adapters of a link such as "a:0.7+b:0.3" as one LoRA adapter that PEFT loads, and return it.

    No base model is loaded. `combination` is "cat" by default, which computes exactly what the link does; `dtype` of
    the file is float32 by default, which holds products of 16-bit factors and weights.

    Raises LinkSyntaxError, AdapterNotFoundError, RequestError, AdapterExistsError, what `link_adapters` raises, and
    what reading and writing adapters raises. Nothing is written then.
    """
    pairs = parse_link(link, adapters)
    check_adapter_destination(resolved(folder), overwrite=overwrite)
    members = [
        (name, weight, read_adapter(find_lora(name, adapters[name], "linked into one adapter")))
        for name, weight in pairs
    ]
    linked = link_adapters(members, combination)
    write_adapter(linked, folder, dtype, overwrite=overwrite)
    return linked
