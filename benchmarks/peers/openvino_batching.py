"""OpenVINO GenAI's side of cpu_peers.py: its continuous batching, in the environment that make_environments.sh makes.

All rows of a pipeline go through the same adapters, so the first one of a job stands for all.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino_genai import Adapter, AdapterConfig, ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig
from worker import Job, Run, serve


class Pipelines:
    """The pipeline of the last job, without adapters or with one: only one is in memory."""

    def __init__(self, workload: dict[str, Any]) -> None:
        self._folder = workload["model_folder"]
        self._adapters = {name: read_adapter(Path(folder)) for name, folder in workload["adapters"].items()}
        self._properties = {
            "INFERENCE_PRECISION_HINT": workload["precision"],
            "INFERENCE_NUM_THREADS": workload["threads"],
        }
        self._name: str | None = None
        self._pipeline: ContinuousBatchingPipeline | None = None

    def generate(self, job: Job) -> list[list[int]]:
        name = job["adapters"][0]
        config = GenerationConfig(max_new_tokens=job["new_tokens"], ignore_eos=True, do_sample=False)
        if name is not None:
            config.adapters = self._adapters[name]
        prompts = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in job["prompts"]]
        results = self._pipeline_for(name).generate(prompts, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]

    def _pipeline_for(self, name: str | None) -> ContinuousBatchingPipeline:
        if self._pipeline is None or name != self._name:
            self._pipeline = None
            scheduler = SchedulerConfig()
            scheduler.enable_prefix_caching = False
            adapters = {} if name is None else {"adapters": self._adapters[name]}
            self._pipeline = ContinuousBatchingPipeline(self._folder, scheduler, "CPU", self._properties | adapters)
            self._name = name
        return self._pipeline


def read_adapter(folder: Path) -> AdapterConfig:
    settings = json.loads((folder / "adapter_config.json").read_text())
    return AdapterConfig(Adapter(folder / "adapter_model.safetensors"), settings["lora_alpha"] / settings["r"])


def prepare(workload: dict[str, Any]) -> tuple[Run, str]:
    return Pipelines(workload).generate, version("openvino-genai")


if __name__ == "__main__":
    serve(prepare)
