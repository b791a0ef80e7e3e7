"""Our side of engine_peers.py and cpu_peers.py."""

from typing import Any

import torch
from worker import Job, Run, serve

import loraplex


def prepare(workload: dict[str, Any]) -> tuple[Run, str]:
    torch.set_num_threads(workload["threads"])
    model = loraplex.MultiLoraModel.from_pretrained(workload["model_folder"], dtype=workload["dtype"])
    for name, folder in workload["adapters"].items():
        model.load_adapter(name, folder)
    engine = loraplex.Engine(model, loraplex.EngineConfig(prefix_cache=False))

    def run(job: Job) -> list[list[int]]:
        sampling = loraplex.SamplingParams(max_tokens=job["new_tokens"], ignore_eos=True)
        requests = [
            loraplex.Request(prompt, adapters=name, sampling=sampling)
            for prompt, name in zip(job["prompts"], job["adapters"], strict=True)
        ]
        return [list(result.token_ids) for result in engine.generate(requests)]

    return run, loraplex.__version__


if __name__ == "__main__":
    serve(prepare)
