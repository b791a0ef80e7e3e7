"""Mixtures from and to folders: the names of their experts in the store, and the experts' files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from loraplex.adapters.store.store import AdapterStore
from loraplex.adapters.store.version import AdapterVersion, folder_fingerprint
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterChangedError, AdapterFormatError, ConfigError, MixtureError
from loraplex.json_files import damaged_as
from loraplex.models.mixtures import AnyMixture
from loraplex.routers.folder import write_router_folder
from loraplex.routers.mixture import RoutedMixture
from loraplex.xlora.formats.mixture_folder import Layout
from loraplex.xlora.formats.write_folder import write_mixture_folder

Experts = Mapping[str, str | Path | None] | Sequence[str] | None


def expert_sources(
    name: str,
    folders: Mapping[str, str | Path],  # of the experts that the mixture's folder has
    expert_names: Sequence[str],
    experts: Experts,
) -> dict[str, str | Path | None]:
    """Where to load each expert from, by the name it gets in the store; None: it is there."""
    if not isinstance(experts, Mapping):
        if experts is not None and tuple(experts) != tuple(expert_names):
            raise MixtureError(
                f"experts names {list(experts)}, but the folder of mixture {name!r} says that the experts are "
                f"{list(expert_names)}, in this order. Leave experts out."
            )
        return {f"{name}/{expert}": path for expert, path in folders.items()}
    if len(experts) != len(expert_names):
        raise MixtureError(
            f"experts names {len(experts)} adapters, {list(experts)}, but the mixture {name!r} has "
            f"{len(expert_names)}: {list(expert_names)}. Name one for each, in this order."
        )
    return dict(experts)


def save_mixture(
    mixture: AnyMixture,
    store: AdapterStore,
    folder: Path,
    *,
    layout: Layout | None,
    base_model_name: str | None,
    overwrite: bool,
) -> None:
    """Write head or router, configuration and experts; these are named as before they were loaded from a folder.

    Raises ConfigError for a layout that the mixture can't have.
    """
    experts = {
        expert.removeprefix(f"{mixture.name}/"): expert_at_rest(store.version(expert)) for expert in mixture.experts
    }
    if isinstance(mixture, RoutedMixture):
        if layout is not None:
            raise ConfigError(
                f"layout is {layout!r}, which is X-LoRA's, but mixture {mixture.name!r} has a router in each layer. "
                "Leave layout out: it is written in loraplex's own format."
            )
        write_router_folder(folder, mixture, experts, base_model_name=base_model_name, overwrite=overwrite)
        return
    write_mixture_folder(
        folder,
        layout=layout or "peft",
        config=mixture.config,
        hidden_size=mixture.head.hidden_size,
        head_state=mixture.head.state_dict(),
        experts=experts,
        base_model_name=base_model_name,
        overwrite=overwrite,
    )


def expert_at_rest(version: AdapterVersion) -> Adapter | Path:
    """An adapter's folder, or the adapter itself if no folder has it. Raises AdapterChangedError."""
    if version.folder is None:
        assert version.original is not None, f"{version.name!r} has neither folder nor weights"
        return version.original
    with damaged_as(AdapterFormatError, version.folder):
        fingerprint = folder_fingerprint(version.folder)
    if fingerprint != version.fingerprint:
        raise AdapterChangedError(
            f"the files of expert {version.name!r} in {version.folder} changed since it was loaded, so it can't be "
            f"saved. Load the new ones: model.load_adapter({version.name!r}, path, replace=True)."
        )
    return version.folder
