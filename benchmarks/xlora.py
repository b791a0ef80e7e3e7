"""How fast does a mixture generate, against PEFT's X-LoRA and against rows of the base model?

python benchmarks/xlora.py                    # all questions, some 15 minutes
python benchmarks/xlora.py --questions peft batch

peft      57 prompt tokens and 128 new ones, batch 1, against PEFT's X-LoRA (which has no cache)
long      milliseconds a token at token 50 and at token 500
draft     prompts of the test data, batch 1: drafted, undrafted, and the base model; how many drafts were right
batch     batch 8: all rows through the mixture, one row, none
refresh   what keeping scalings for k tokens saves, and how far it leads away from the exact mixture
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from adapters import write_random_adapters
from common import alternate, console, medians, print_table, save
from torch import Tensor

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.models.loading import load_base_model
from loraplex.models.text import encode_prompts

RANKS = (8, 16, 4, 32)
QUESTIONS = ("peft", "long", "draft", "batch", "refresh")
REFRESH = (1, 2, 4, 8, 16)
MIXTURE = "mixture"


def with_mixture(model_name: str, dtype: str, paths: Mapping[str, Path]) -> MultiLoraModel:
    model = MultiLoraModel.from_pretrained(model_name, dtype=dtype)
    for name, path in paths.items():
        model.load_adapter(name, path)
    model.create_mixture(MIXTURE, list(paths), XLoraConfig(layerwise_scalings=True))
    return model


def peft_mixture(model_name: str, dtype: str, paths: Mapping[str, Path]) -> peft.PeftModel:
    base = load_base_model(model_name, dtype=dtype, device="cpu")[0]
    base.config.use_cache = False  # PEFT refuses to make a mixture with a cache
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(i): str(path) for i, path in enumerate(paths.values())},
        layerwise_scalings=True,
    )
    return peft.get_peft_model(base, config).eval()


def exactly(num_tokens: int) -> dict[str, Any]:
    return {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}


def speed(run: Callable[[], Tensor], num_tokens: int) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        run()
        return num_tokens / (time.perf_counter() - start)

    return timed


def random_prompt(rows: int, length: int) -> Tensor:
    return torch.randint(1000, 40000, (rows, length), generator=torch.Generator().manual_seed(0))


def against_peft(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> dict[str, Any]:
    ours, theirs = with_mixture(options.model, dtype, paths), peft_mixture(options.model, dtype, paths)
    ids = random_prompt(1, 57)
    num_tokens = options.new_tokens
    sides = {
        "peft": speed(lambda: theirs.generate(input_ids=ids, **exactly(num_tokens)), num_tokens),
        "loraplex": speed(lambda: ours.generate(ids, adapters=[MIXTURE], **exactly(num_tokens)), num_tokens),
    }
    ours.generate(ids, adapters=[MIXTURE], **exactly(4))  # a warm-up; PEFT's run takes minutes, where one counts little
    return {"tokens_per_s": {side: run() for side, run in sides.items()}}


def along_the_sequence(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> dict[str, Any]:
    """Milliseconds a token around token 50 and around token 500: differences of whole generations."""
    model = with_mixture(options.model, dtype, paths)
    ids = random_prompt(1, 8)

    def seconds(num_tokens: int) -> float:
        start = time.perf_counter()
        model.generate(ids, adapters=[MIXTURE], draft=False, **exactly(num_tokens))
        return time.perf_counter() - start

    times = medians(alternate({str(n): lambda n=n: seconds(n) for n in (20, 80, 470, 530)}, options.rounds))
    return {
        "ms_at_50": (times["80"] - times["20"]) / 60 * 1e3,
        "ms_at_500": (times["530"] - times["470"]) / 60 * 1e3,
    }


def science_or_random(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> MultiLoraModel:
    if options.mixture is None:
        return with_mixture(options.model, dtype, paths)
    model = MultiLoraModel.from_pretrained(options.model, dtype=dtype)
    model.load_mixture(MIXTURE, options.mixture)
    return model


def drafted(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> dict[str, Any]:
    """The science mixture on held-out questions where it is there; else random experts on the same prompts."""
    model = science_or_random(options, dtype, paths)
    prompts = [encode_prompts(model.tokenizer, [text])["input_ids"] for text in held_out_prompts(options.prompts)]

    def run(choice: str | None, draft: bool) -> Callable[[], float]:
        def timed() -> float:
            start = time.perf_counter()
            for ids in prompts:
                model.generate(ids, adapters=[choice], draft=draft, **exactly(options.draft_tokens))
            return len(prompts) * options.draft_tokens / (time.perf_counter() - start)

        return timed

    sides = {"base": run(None, False), "undrafted": run(MIXTURE, False), "drafted": run(MIXTURE, True)}
    speeds = medians(alternate(sides, options.rounds))
    counts = model.draft_counts
    return {"tokens_per_s": speeds, "acceptance": counts.accepted / counts.drafted, "mixture": str(options.mixture)}


def held_out_prompts(num_prompts: int) -> list[str]:
    """Some questions of every domain's test split."""
    files = sorted((Path(__file__).parent.parent / "data").glob("*/test.jsonl"))
    lines = [file.read_text().splitlines() for file in files]
    texts = [line for same_rank in zip(*lines, strict=False) for line in same_rank][:num_prompts]
    return [json.loads(line)["messages"][0]["content"] for line in texts]


def batch_of_8(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> dict[str, Any]:
    model = with_mixture(options.model, dtype, paths)
    ids, num_tokens = random_prompt(8, 32), options.new_tokens
    adapters = [list(paths)[i % len(paths)] for i in range(8)]

    def run(choices: list[str | None]) -> Callable[[], float]:
        return speed(lambda: model.generate(ids, adapters=choices, **exactly(num_tokens)), 8 * num_tokens)

    sides = {
        "base": run([None] * 8),
        "all_mixture": run([MIXTURE] * 8),
        "one_mixture": run([MIXTURE, *adapters[1:]]),
        "adapters": run(adapters),
    }
    return {"tokens_per_s": medians(alternate(sides, options.rounds))}


def refreshed(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> dict[str, Any]:
    """Speed, and two distances from `refresh=1`: tokens before the first other one, and their probability in it."""
    model = science_or_random(options, dtype, paths)
    prompts = [encode_prompts(model.tokenizer, [text])["input_ids"] for text in held_out_prompts(options.prompts)]
    speeds: dict[str, float] = {}
    same: dict[str, float] = {}
    logprob: dict[str, float] = {}
    exact: list[Tensor] = []
    for refresh in REFRESH:
        start = time.perf_counter()
        kept = {"draft": False, "refresh": refresh, **exactly(options.draft_tokens)}
        answers = [model.generate(ids, adapters=[MIXTURE], **kept) for ids in prompts]
        speeds[str(refresh)] = len(prompts) * options.draft_tokens / (time.perf_counter() - start)
        exact = exact or answers
        agreed = [(a == b).long().cumprod(dim=1).sum() for a, b in zip(answers, exact, strict=True)]
        lengths = [answer.shape[1] - ids.shape[1] for answer, ids in zip(answers, prompts, strict=True)]
        common = [int(n) - ids.shape[1] for n, ids in zip(agreed, prompts, strict=True)]
        same[str(refresh)] = sum(common) / sum(lengths)
        scores = [mean_logprob(model, a, ids.shape[1]) for a, ids in zip(answers, prompts, strict=True)]
        logprob[str(refresh)] = sum(scores) / len(scores)
    return {"tokens_per_s": speeds, "same_before_the_first_other": same, "mean_logprob_in_the_exact_mixture": logprob}


def mean_logprob(model: MultiLoraModel, sequence: Tensor, num_prompt: int) -> float:
    """Of the new tokens, in the mixture without approximation."""
    logits = model(sequence, adapters=[MIXTURE]).logits[0, num_prompt - 1 : -1].float()
    return float(logits.log_softmax(dim=-1).gather(1, sequence[0, num_prompt:, None]).mean())


RUNS = {
    "peft": against_peft,
    "long": along_the_sequence,
    "draft": drafted,
    "batch": batch_of_8,
    "refresh": refreshed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--peft-dtypes", nargs="+", default=["bfloat16", "float32"], help="for the question of PEFT")
    parser.add_argument("--mixture", type=Path, help="folder of a trained mixture, for the question of drafts")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        base = load_base_model(options.model, dtype="bfloat16", device="cpu")[0]
        paths = write_random_adapters(base, Path(folder), RANKS)
        for question in options.questions:
            for dtype in options.peft_dtypes if question == "peft" else options.dtypes:
                result = {"question": question, "dtype": dtype} | RUNS[question](options, dtype, paths)
                console.print(result)
                results.append(result)
    report(results)
    if not options.no_save:
        workload = {key: str(value) for key, value in vars(options).items()}
        save("xlora", workload | {"ranks": RANKS, "targets": "all 7", "peft_prompt_tokens": 57}, results)


def report(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        speeds = result.get("tokens_per_s", {})
        figures = {key: value for key, value in result.items() if isinstance(value, float)} | speeds
        first = next(iter(speeds.values()), None)
        last = [f"{value / first:.2f}" for value in speeds.values()] if first else []
        cells = ", ".join(f"{key} {value:.2f}" for key, value in figures.items())
        rows.append([f"{result['question']}, {result['dtype']}", cells, " / ".join(last)])
    print_table("Mixtures", ["question", "figures", "relative to the first"], rows)


if __name__ == "__main__":
    main()
