"""`model=` in vLLM's OpenAI server: names of adapters, mixtures and links of them."""

import asyncio

from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from loraplex.errors import AdapterNotFoundError, RequestError
from loraplex.vllm_plugin.catalog import FolderCatalog

_ANY_ID = 1  # vLLM gives every request that it takes an id of its own


class LinkResolver(LoRAResolver):
    """Finds what a name or link stands for in the plugin's catalog."""

    def __init__(self, catalog: FolderCatalog) -> None:
        self._catalog = catalog

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter, mixture or link of that name; None if it is none of the catalog's.

        Raises VLLMValidationError for a malformed link and VLLMNotFoundError for one of unknown names: no other
        resolver reads links.
        """
        is_link = ":" in lora_name or "+" in lora_name
        try:
            link, wanted = await asyncio.to_thread(self._catalog.link, lora_name)
        except AdapterNotFoundError as error:
            if is_link:
                raise VLLMNotFoundError(str(error)) from error
            return None
        except RequestError as error:  # malformed, or a name that leads out of the folder
            raise VLLMValidationError(str(error), parameter="model") from error
        is_plain = len(link) == 1 and link[0][1] == 1
        path = str(wanted[0][0]) if is_plain else lora_name
        return LoRARequest(lora_name, _ANY_ID, path)
