"""vLLM's side of benchmarks/engine_peers.py: its CPU build, in the environment that make_environments.sh makes."""

import os
from typing import Any

from worker import Job, Run, serve


def prepare(workload: dict[str, Any]) -> tuple[Run, str]:
    last = workload["threads"] - 1
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{last}" if last else "0")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB, as ours
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from importlib.metadata import version

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=workload["model_folder"],
        dtype=workload["dtype"],
        enable_lora=True,
        max_loras=len(workload["adapters"]),
        max_lora_rank=32,
        max_model_len=512,
        enforce_eager=True,  # with LoRA its CPU build compiles nothing anyway
        enable_prefix_caching=False,
    )
    adapters = {
        name: LoRARequest(name, i, folder) for i, (name, folder) in enumerate(workload["adapters"].items(), start=1)
    }

    def run(job: Job) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        choices = [adapters[name] for name in job["adapters"]]
        results = llm.generate(prompts, sampling, lora_request=choices, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    return run, version("vllm-cpu")


if __name__ == "__main__":
    serve(prepare)
