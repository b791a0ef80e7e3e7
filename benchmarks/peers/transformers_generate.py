"""transformers' side of cpu_peers.py, in loraplex's environment; adapters through PEFT's mixed batch."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, __version__
from worker import Job, Run, serve


class Model:
    """The plain model, with PEFT's layers in it only while adapters are asked for."""

    def __init__(self, folder: str, dtype: torch.dtype, adapters: Mapping[str, str]) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._base.generation_config.eos_token_id = None  # all answers have the same length
        self._adapters = adapters
        self._adapted: PeftModel | None = None

    @torch.no_grad()
    def generate(self, job: Job) -> list[list[int]]:
        ids = torch.tensor(job["prompts"])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": job["new_tokens"]}
        if job["adapters"][0] is None:
            tokens = self._plain().generate(**inputs, do_sample=False)
        else:
            tokens = self._with_adapters().generate(**inputs, do_sample=False, adapter_names=job["adapters"])
        answers: list[list[int]] = tokens[:, ids.shape[1] :].tolist()
        return answers

    def _plain(self) -> Any:
        if self._adapted is not None:
            self._base = self._adapted.unload()
            self._adapted = None
        return self._base

    def _with_adapters(self) -> PeftModel:
        if self._adapted is None:
            (first, folder), *others = self._adapters.items()
            self._adapted = PeftModel.from_pretrained(self._base, folder, first)
            for name, folder in others:
                self._adapted.load_adapter(folder, name)
            self._adapted.eval()
        return self._adapted


def prepare(workload: dict[str, Any]) -> tuple[Run, str]:
    torch.set_num_threads(workload["threads"])
    model = Model(workload["model_folder"], getattr(torch, workload["dtype"]), workload["adapters"])
    return model.generate, __version__


if __name__ == "__main__":
    serve(prepare)
