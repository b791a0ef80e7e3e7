"""Loading, replacing, pinning and unloading on behalf of one principal."""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fastapi import Request

from loraplex.adapters.store.version import AdapterState
from loraplex.errors import LoraplexError
from loraplex.residual.sources import is_residual_source
from loraplex.routers.folder import is_router_folder, read_router_folder
from loraplex.server.api.api_errors import BAD_REQUEST, FORBIDDEN, NOT_FOUND, ApiError, Status
from loraplex.server.auth.access import Entry, Kind
from loraplex.server.auth.path_sandbox import AdapterRoots
from loraplex.server.state import context_of, in_thread, state_of
from loraplex.xlora.formats.folders import is_mixture_folder, read_mixture_folder

logger = logging.getLogger(__name__)

_NAME_IS_BASE = Status(409, "invalid_request_error", "adapter_exists")


class AdapterLibrary:
    """Checks names by the key's patterns before anything else, so that refusals don't tell what exists."""

    def __init__(self, http: Request) -> None:
        self._state = state_of(http)
        self._model = self._state.model
        self._context = context_of(http)
        self._principal = self._context.principal
        self._http = http

    @cached_property
    def _roots(self) -> AdapterRoots:
        """The folders that the principal may load from."""
        key = self._principal.key
        return self._state.roots if key is None or key.manage else self._state.roots.within(key.roots)

    # Asking

    def states(self) -> list[dict[str, Any]]:
        """Of everything that the principal may use."""
        states = self._states()
        return [self._describe(entry, states) for entry in self._state.catalog.visible(self._principal)]

    def state(self, name: str) -> dict[str, Any]:
        entry = self._state.catalog.entry(name)
        if entry is None or not self._principal.may_load(name):
            entry = self._state.catalog.find(name, self._principal)
        return self._describe(entry, self._states())

    @property
    def may_load(self) -> bool:
        """Whether the principal may load anything: some name, from some folder."""
        key = self._principal.key
        may_name = self._principal.may_manage or (key is not None and bool(key.load))
        return may_name and not self._roots.is_empty

    def is_loaded(self, name: str) -> bool:
        return self._state.catalog.entry(name) is not None

    def check_load(self, name: str) -> None:
        """Refuse a name that the principal may not load, or that is the base model's."""
        self._principal.check_load(name)
        if name == self._state.catalog.base_name:
            raise ApiError(_NAME_IS_BASE, f"{name!r} is the name of the base model.", param="name")

    # Changing

    async def load(
        self, name: str, path: str, *, kind: Kind | None = None, experts: Mapping[str, str | None] | None = None
    ) -> None:
        """Load what is in a folder, or a file in GGUF, below the roots."""
        self.check_load(name)
        folder = await self._run(lambda: self._roots.source(path))
        kind = kind or await self._run(partial(_kind_of, folder))
        if experts is not None and kind != "mixture":
            raise ApiError(BAD_REQUEST, f"experts are a mixture's, but this folder holds: {kind}.", param="experts")
        if kind == "mixture":
            sources = None if experts is None else await self._run(partial(self._expert_sources, experts))
            await self._run(partial(self._load_mixture, name, folder, sources))
        elif kind == "residual":
            await self._run(partial(self._model.load_residual, name, folder))
        else:
            await self._run(partial(self._model.load_adapter, name, folder))
        self._log("loaded", name, folder=str(folder))

    async def replace(self, name: str, path: str) -> None:
        """Load another version of an adapter or residual."""
        self.check_load(name)
        entry = self._loaded(name)
        if entry.kind == "mixture":
            raise ApiError(BAD_REQUEST, "a mixture can't be replaced. Unload it, and load the new one.", param="name")
        folder = await self._run(lambda: self._roots.source(path))
        load = self._model.load_residual if entry.kind == "residual" else self._model.load_adapter
        await self._run(partial(load, name, folder, replace=True))
        self._log("replaced", name, folder=str(folder))

    async def pin(self, name: str, *, pinned: bool) -> None:
        """Keep an adapter, or all experts of a mixture, in slots."""
        self._principal.check_load(name)
        entry = self._loaded(name)
        if entry.kind == "residual":
            raise ApiError(BAD_REQUEST, "a residual has no slot that it could be pinned in.", param="pinned")
        for adapter in entry.experts or (name,):
            self._principal.check_load(adapter)
        for adapter in entry.experts or (name,):
            await self._run(partial(self._model.pin, adapter, pinned))
        self._log("pinned" if pinned else "unpinned", name)

    async def unload(self, name: str) -> None:
        self._principal.check_load(name)
        self._loaded(name)
        versions = self._versions(name)
        await self._run(partial(self._model.unload, name))
        self._state.metrics.forget(name)
        self._log("unloaded", name, versions=versions)

    def _log(self, what: str, name: str, *, versions: Mapping[str, int] | None = None, **fields: str) -> None:
        """Who has changed what, in a line of its own."""
        fields |= {"adapter": name, "key": self._principal.id, "request_id": self._context.id}
        found = self._versions(name) if versions is None else versions
        logger.info("%s", what, extra={**fields, "versions": dict(found)})

    def _versions(self, name: str) -> dict[str, int]:
        """Of an adapter, or of all experts of a mixture."""
        entry = self._state.catalog.entry(name)
        members = (name,) if entry is None else entry.experts or (name,)
        return {state.name: state.version for state in self._model.adapters() if state.name in members}

    def _expert_sources(self, experts: Mapping[str, str | None]) -> dict[str, Path | None]:
        """The folders of experts; those that are loaded already must be the principal's to use."""
        sources: dict[str, Path | None] = {}
        for name, path in experts.items():
            if path is None:
                self._state.catalog.find(name, self._principal)
                sources[name] = None
            else:
                self.check_load(name)
                sources[name] = self._roots.folder(path)
        return sources

    def _load_mixture(self, name: str, folder: Path, sources: Mapping[str, Path | None] | None) -> None:
        if sources is None:
            found = read_router_folder(folder) if is_router_folder(folder) else read_mixture_folder(folder)
            for expert, path in found.experts.items():
                self._principal.check_load(f"{name}/{expert}")
                if not self._roots.contains(path):
                    message = f"the folder names its expert {expert!r} in a place that is not below adapter_roots."
                    raise ApiError(FORBIDDEN, message, param="path")
                self._roots.folder(str(path))
        self._model.load_mixture(name, folder, experts=sources)

    def _loaded(self, name: str) -> Entry:
        entry = self._state.catalog.entry(name)
        if entry is None:
            raise ApiError(NOT_FOUND, f"{name[:300]!r} is not loaded.", param="name")
        return entry

    async def _run(self, work: Callable[[], Any]) -> Any:
        """Do it in a thread, unless the client leaves before it begins.

        Errors don't tell paths outside of the roots, or names of others.
        """
        try:
            return await in_thread(self._http, work, self._state.loaders)
        except LoraplexError as error:
            told = self._context.refusal(error)
            raise ApiError(told.status, self._roots.without_roots(told.message)) from error

    def _states(self) -> dict[str, AdapterState]:
        return {state.name: state for state in self._model.adapters()}

    def _describe(self, entry: Entry, known: Mapping[str, AdapterState]) -> dict[str, Any]:
        described: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "experts": list(entry.experts)}
        members = entry.experts or (entry.name,)
        states = [known[name] for name in members if name in known]
        described |= {
            "num_bytes": sum(state.num_bytes for state in states),
            "pinned": bool(states) and all(state.pinned for state in states),
            "in_use": sum(state.num_leases for state in states),
            "may_load": self._principal.may_load(entry.name),
        }
        if entry.kind == "adapter" and states:
            described |= {"version": states[0].version, "tier": states[0].tier}
            if self._principal.may_manage:
                described["folder"] = states[0].folder
        return described


def _kind_of(folder: Path) -> Kind:
    """What a folder holds."""
    if is_residual_source(folder):
        return "residual"
    return "mixture" if is_router_folder(folder) or is_mixture_folder(folder) else "adapter"
