"""Mixtures from and to folders: the folder's experts become adapters of the store, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.adapters.hub import resolve_mixture_folder
from loraplex.adapters.version import AdapterVersion, folder_fingerprint
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterChangedError, MixtureError
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.mixture_folder import Layout, MixtureFolder
from loraplex.xlora.formats.write_folder import write_mixture_folder

if TYPE_CHECKING:
    from loraplex.models.multi_lora import MultiLoraModel


def load_mixture(
    model: "MultiLoraModel", name: str, source: str | Path, experts: Mapping[str, str | Path | None] | None
) -> None:
    """Read the folder, load its experts and register the mixture; what was loaded is unloaded again if that fails."""
    model.mixtures.check_new(name)
    folder = read_mixture_folder(resolve_mixture_folder(source).absolute(), find_experts=experts is None)
    sources = _expert_sources(name, folder, experts)
    loaded: list[str] = []
    try:
        for expert, path in sources.items():
            if path is not None:
                model.load_adapter(expert, path)
                loaded.append(expert)
        owned = loaded if experts is None else ()
        model.mixtures.add(
            name, list(sources), folder.config, head=folder.head, hidden_size=folder.hidden_size, owned=owned
        )
    except BaseException:
        for expert in loaded:
            model.store.remove(expert)
        raise


def save_mixture(model: "MultiLoraModel", name: str, folder: str | Path, *, layout: Layout, overwrite: bool) -> None:
    """Write head, configuration and experts."""
    mixture = model.mixtures.get(name)
    experts = {expert.removeprefix(f"{name}/"): expert_at_rest(model.store.version(expert)) for expert in mixture.experts}
    write_mixture_folder(
        Path(folder),
        layout=layout,
        config=mixture.config,
        hidden_size=model.mixtures.hidden_size,
        head_state=mixture.head.state_dict(),
        experts=experts,
        base_model_name=model.base.config.name_or_path or None,
        overwrite=overwrite,
    )


def _expert_sources(
    name: str, folder: MixtureFolder, experts: Mapping[str, str | Path | None] | None
) -> dict[str, str | Path | None]:
    """Where to load each expert from, by the name it gets in the store; None: it is there."""
    if experts is None:
        return {f"{name}/{expert}": path for expert, path in folder.experts.items()}
    if len(experts) != folder.num_experts:
        raise MixtureError(
            f"experts names {len(experts)} adapters, {list(experts)}, but the mixture {name!r} has "
            f"{folder.num_experts}: {list(folder.expert_names)}. Name one for each, in this order."
        )
    return dict(experts)


def expert_at_rest(version: AdapterVersion) -> Adapter | Path:
    """An adapter's folder, or the adapter itself if no folder has it. Raises AdapterChangedError."""
    if version.folder is None:
        assert version.original is not None, f"{version.name!r} has neither folder nor weights"
        return version.original
    if folder_fingerprint(version.folder) != version.fingerprint:
        raise AdapterChangedError(
            f"the files of expert {version.name!r} in {version.folder} changed since it was loaded, so it can't be "
            f"saved. Load the new ones: model.load_adapter({version.name!r}, path, replace=True)."
        )
    return version.folder
