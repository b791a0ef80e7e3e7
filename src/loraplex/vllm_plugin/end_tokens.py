"""What an adapter was trained to end its answers with ends them inside vLLM too: `end_tokens` of its loraplex.json."""

import logging
from collections.abc import Iterator
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from loraplex.adapters.peft.record import read_record
from loraplex.errors import LoraplexError
from loraplex.routers.folder import is_router_folder, read_router_folder
from loraplex.vllm_plugin.catalog import FolderCatalog
from loraplex.xlora.formats.folders import is_mixture_folder, read_mixture_folder

logger = logging.getLogger(__name__)


class AdapterEnds:
    """The end tokens of adapters, links and mixtures, read once for each `lora_int_id`."""

    def __init__(self, catalog: FolderCatalog) -> None:
        self._catalog = catalog
        self._known: dict[int, tuple[int, ...]] = {}

    def of(self, request: LoRARequest) -> tuple[int, ...]:
        """Of all adapters of a link, and all experts of its mixtures; none where the folders can't be read.

        Such a request is refused where its weights are read, which tells what is wrong.
        """
        number = request.lora_int_id
        if number not in self._known or request.load_inplace:
            try:
                ends = tuple(dict.fromkeys(self._read(request.lora_path)))
            except (LoraplexError, OSError) as error:
                logger.debug("no end tokens of %r: %s", request.lora_name, error)
                return ()
            self._known[number] = ends
        return self._known[number]

    def add(self, request: LoRARequest | None, params: SamplingParams | None) -> None:
        """Let a request stop at its adapters' end tokens, beside the base model's and its own."""
        if request is None or params is None or params.ignore_eos:
            return
        ends = self.of(request)
        if ends:
            params.stop_token_ids = sorted({*(params.stop_token_ids or ()), *ends})
            params.all_stop_token_ids.update(ends)  # those that min_tokens holds back

    def _read(self, path: str) -> Iterator[int]:
        for folder, _ in self._catalog.find(path):
            for part in self._adapters(folder):
                yield from read_record(part)

    def _adapters(self, folder: Path) -> list[Path]:
        if is_router_folder(folder):
            return [self._catalog.check_expert(folder, e) for e in read_router_folder(folder).experts.values()]
        if not is_mixture_folder(folder):
            return [folder]
        experts = read_mixture_folder(folder).experts.values()
        return [self._catalog.check_expert(folder, expert) for expert in experts]
