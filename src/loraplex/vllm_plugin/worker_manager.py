"""vLLM's loader of adapters, with links, mixtures and residuals."""

import functools
from pathlib import Path

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from loraplex.adapters.peft.hub import may_be_hub_id
from loraplex.adapters.store.version import Fingerprint, folder_fingerprint
from loraplex.errors import AdapterChangedError, AdapterNotFoundError
from loraplex.residual.sources import is_residual_source
from loraplex.routers.folder import is_router_folder
from loraplex.vllm_plugin.base_modules import BaseModules
from loraplex.vllm_plugin.catalog import FolderCatalog, Wanted
from loraplex.vllm_plugin.link_loader import EngineLimits, LinkLoader
from loraplex.vllm_plugin.model_manager import LinkModelManager
from loraplex.vllm_plugin.options import PluginOptions
from loraplex.xlora.formats.folders import is_mixture_folder


class LinkWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads what a LoRARequest's path stands for: an adapter's folder as vLLM does, links and mixtures as one LoRA."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str], options: PluginOptions
    ) -> None:
        super().__init__(vllm_config, device, embedding_modules)
        self._options = options
        self._model_config = vllm_config.model_config
        self._catalog = FolderCatalog(options)
        self._manager_cls = functools.partial(LinkModelManager, options=options)
        # By name and path, the files that were loaded: other weights meet their keys and values in the prefix cache.
        self._fingerprints: dict[str, tuple[tuple[Fingerprint, ...], ...]] = {}

    @functools.cached_property
    def _loader(self) -> LinkLoader:
        """Made with the first link: it builds the model's modules without weights."""
        config = self._model_config
        dtype = self.lora_config.lora_dtype
        assert isinstance(dtype, torch.dtype), f"lora_dtype is {dtype!r}, which vLLM should have resolved"
        limits = EngineLimits(
            max_rank=self.lora_config.max_lora_rank,
            dtype=dtype,
            device=self.device,
            hidden_size=config.get_hidden_size(),
        )
        base = BaseModules(config.hf_config, trust_remote_code=config.trust_remote_code)
        residuals = self._adapter_manager.residual_limits(config.hf_config, base)
        return LinkLoader(self._catalog, self._options, base, self._adapter_manager.places, limits, residuals)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        try:
            wanted = self._catalog.find(lora_request.lora_path)
        except AdapterNotFoundError:
            if self._options.allows_any_path and may_be_hub_id(lora_request.lora_path):
                return super()._load_adapter(lora_request)
            raise
        now = tuple(_fingerprint(folder) for folder, _ in wanted)
        name = f"{lora_request.lora_name}\n{lora_request.lora_path}"
        if self._fingerprints.get(name, now) != now and not lora_request.load_inplace:
            raise AdapterChangedError(
                f"the files of {lora_request.lora_name!r} ({lora_request.lora_path}) changed since it was loaded, and "
                "keys and values of the old weights may be in the prefix cache. Serve the new ones under another name."
            )
        lora = self._load(lora_request, wanted)
        self._fingerprints[name] = now
        return lora

    def _load(self, lora_request: LoRARequest, wanted: Wanted) -> LoRAModel:
        (folder, weight), *others = wanted
        is_of_ours = is_mixture_folder(folder) or is_router_folder(folder) or is_residual_source(folder)
        if others or weight != 1 or is_of_ours:
            return self._loader.load(lora_request.lora_int_id, wanted)
        return super()._load_adapter(msgspec.structs.replace(lora_request, lora_path=str(folder)))


def _fingerprint(folder: Path) -> tuple[Fingerprint, ...]:
    """Of a folder and, if it holds a mixture, of its experts' folders in it; or of a control vector's file."""
    if folder.is_file():
        status = folder.stat()
        return (((folder.name, status.st_size, status.st_mtime_ns),),)
    return tuple(
        folder_fingerprint(path) for path in (folder, *sorted(path for path in folder.rglob("*") if path.is_dir()))
    )
