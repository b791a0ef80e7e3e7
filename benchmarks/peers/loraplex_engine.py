"""Our side of benchmarks/engine_peers.py."""

from typing import Any

import torch
from worker import Round, serve

import loraplex


def prepare(workload: dict[str, Any]) -> tuple[Round, str]:
    torch.set_num_threads(workload["threads"])
    model = loraplex.MultiLoraModel.from_pretrained(workload["model"], dtype=workload["dtype"])
    for name, folder in workload["adapters"].items():
        model.load_adapter(name, folder)
    engine = loraplex.Engine(model, loraplex.EngineConfig(prefix_cache=False))
    sampling = loraplex.SamplingParams(max_tokens=workload["new_tokens"], ignore_eos=True)
    choices = list(workload["adapters"]) or [None] * len(workload["prompts"])
    requests = [
        loraplex.Request(prompt, adapters=choice, sampling=sampling)
        for prompt, choice in zip(workload["prompts"], choices, strict=True)
    ]

    def run() -> list[list[int]]:
        return [list(result.token_ids) for result in engine.generate(requests)]

    return run, loraplex.__version__


if __name__ == "__main__":
    serve(prepare)
