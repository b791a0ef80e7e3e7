"""Describe mixtures and links at rest, for `loraplex inspect`: what they are made of, and how alike their parts are."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.inspect import AdapterReport, describe
from loraplex.adapters.overlap import cosines, update_products
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.tensor_file import open_tensor_file
from loraplex.models.convert.link_members import find_lora, parse_link
from loraplex.routers.folder import KINDS, ROUTER_FILE, is_router_folder, read_router_folder
from loraplex.xlora.formats.folders import read_mixture_folder

_LAYOUTS = {"peft": "PEFT's layout", "xlora": "the original package's layout"}


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """An expert of a mixture, or a member of a link."""

    name: str
    source: str  # folder or hub id
    adapter: AdapterReport | None  # None: it is not in the folder
    weight: float | None = None  # of a link's member
    norm: float | None = None  # of its update over all modules, without the weight


@dataclass(frozen=True, kw_only=True)
class CompositeReport:
    """What `loraplex inspect` tells about a mixture or a link."""

    name: str
    kind: str
    base_model: str | None
    settings: Mapping[str, Any]
    num_parameters: int  # of head or router, without the experts
    num_layers: int | None  # LoRA layers that head or router was made for; None: it doesn't say
    parts: tuple[PartReport, ...]
    # [parts][parts]  cosines between the updates; empty where a part wasn't read
    cosines: tuple[tuple[float, ...], ...]
    norm: float | None = None  # of a link's update, with the weights

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe_mixture(folder: Path, *, ignore_unknown: bool = False) -> CompositeReport:
    """Read a mixture's folder, X-LoRA's or one with a router, and its experts.

    Raises what reading them raises.
    """
    if is_router_folder(folder):
        found = read_router_folder(folder, find_experts=False)
        kind = next(kind for kind, config in KINDS.items() if isinstance(found.config, config))
        num_parameters = 0
        if (folder / ROUTER_FILE).is_file():
            with open_tensor_file(folder / ROUTER_FILE) as file:
                num_parameters = sum(math.prod(entry.shape) for entry in file.entries.values())
        return _composite(
            folder,
            {name: str(path) for name, path in found.experts.items()},
            kind=f"{kind} router",
            base_model=found.base_model_name,
            settings=asdict(found.config),
            num_parameters=num_parameters,
            num_layers=len(found.layers) or None,
            ignore_unknown=ignore_unknown,
        )
    mixture = read_mixture_folder(folder)
    return _composite(
        folder,
        {name: str(path) for name, path in mixture.experts.items()},
        kind=f"X-LoRA in {_LAYOUTS[mixture.layout]}",
        base_model=mixture.base_model_name,
        settings={"hidden_size": mixture.hidden_size, **asdict(mixture.config)},
        num_parameters=sum(tensor.numel() for tensor in mixture.head.values()),
        num_layers=mixture.num_layers,
        ignore_unknown=ignore_unknown,
    )


def _composite(folder: Path, experts: Mapping[str, str], *, ignore_unknown: bool, **described: Any) -> CompositeReport:
    read = {name: Path(source) for name, source in experts.items() if os.path.isdir(source)}
    adapters = [
        read_adapter(path, ignore_unknown=ignore_unknown, check_contents=lambda *_: None) for path in read.values()
    ]
    products = update_products(adapters)
    norms = dict(zip(read, products.diagonal().clamp_min(0).sqrt().tolist(), strict=True))
    parts = tuple(
        PartReport(
            name=name,
            source=source,
            adapter=describe(read[name], ignore_unknown=ignore_unknown) if name in read else None,
            norm=norms.get(name),
        )
        for name, source in experts.items()
    )
    alike = cosines(products).tolist() if len(read) == len(experts) else []
    return CompositeReport(name=folder.resolve().name, parts=parts, cosines=tuple(map(tuple, alike)), **described)


def describe_link(link: str, adapters: Mapping[str, str | Path]) -> CompositeReport:
    """Read the adapters of a link such as "a:0.7+b:0.3", which `adapters` has by name.

    Raises LinkSyntaxError, AdapterNotFoundError, RequestError, and what reading adapters raises.
    """
    pairs = parse_link(link, adapters)
    folders = {name: find_lora(name, adapters[name], "inspected in a link") for name, _ in pairs}
    products = update_products([read_adapter(folder) for folder in folders.values()])
    norms = products.diagonal().clamp_min(0).sqrt().tolist()
    reports = [describe(folder) for folder in folders.values()]
    parts = tuple(
        PartReport(name=name, source=str(folders[name]), adapter=report, weight=weight, norm=norm)
        for (name, weight), report, norm in zip(pairs, reports, norms, strict=True)
    )
    weights = products.new_tensor([weight for _, weight in pairs])
    return CompositeReport(
        name=link,
        kind="link",
        base_model=next((report.base_model for report in reports if report.base_model), None),
        settings={},
        num_parameters=0,
        num_layers=None,
        parts=parts,
        cosines=tuple(map(tuple, cosines(products).tolist())),
        norm=float((weights @ products @ weights).clamp_min(0).sqrt()),
    )
