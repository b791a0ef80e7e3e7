"""mistral.rs's side of benchmarks/engine_peers.py, in the environment that make_environments.sh makes.

One request to the base model. Its end token is made impossible, so that it gives as many tokens as were asked for.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mistralrs import Architecture, CompletionRequest, ModelDType, Runner, Which
from worker import Job, Run, serve


def readable_folder(model: Path) -> Path:
    """The model's files with a configuration as transformers 4 wrote it: mistral.rs wants `rope_theta` at its top."""
    folder = Path(tempfile.mkdtemp())
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    config |= {key: value for key, value in config.get("rope_parameters", {}).items() if key == "rope_theta"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prepare(workload: dict[str, Any]) -> tuple[Run, str]:
    dtypes = {"float32": ModelDType.F32, "bfloat16": ModelDType.BF16}
    which = Which.Plain(
        model_id=str(readable_folder(Path(workload["model_folder"]))),
        arch=Architecture.Llama,
        dtype=dtypes[workload["dtype"]],
    )
    runner = Runner(which=which, prefix_cache_n=0)

    def run(job: Job) -> int:
        request = CompletionRequest(
            model="default",
            prompt=workload["text"],
            max_tokens=job["new_tokens"],
            temperature=0.0,
            logit_bias=dict.fromkeys(workload["end_tokens"], -1000.0),
        )
        return int(runner.send_completion_request(request).usage.completion_tokens)

    return run, version("mistralrs")


if __name__ == "__main__":
    serve(prepare)
