"""A LoRA beside a vector, a linked residual and LoReFT of about its size: quality, training time, bytes, cost a token.

    python benchmarks/adapter_kinds.py

One task (materials: is a compound's bulk modulus low, medium or high), SmolLM2-135M, the same records, steps and
batches for all that is trained, each with the best of its learning rates by held-out loss. The vector is the mean
difference between texts with the right answer and with a wrong one, on all blocks but the first, with the best of four
strengths on validation questions; it can't tell one question from another. Quality is exact match on test questions,
with its standard error. Minutes are of the processor, of one run of training. Cost is the engine's throughput of 8 rows
that all go through the adapter, of that of 8 base rows; ratios are taken within a round, and then their median.
"""

import argparse
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import alternate, console, print_table, save

from loraplex import Engine, EngineConfig, LoraConfig, MultiLoraModel, Request, SamplingParams
from loraplex.models.prompts import as_chat
from loraplex.residual import ResidualConfig, write_residual
from loraplex.residual.reft import ReftConfig
from loraplex.residual.vectors import block_vector_from_pairs
from loraplex.training import AdapterJob, EvaluationConfig, OptimizerConfig, StepsConfig, TrainConfig, train_adapters
from loraplex.training.adapters.evaluation import Question, evaluate, read_questions

LABELS = ("low", "medium", "high")
STRENGTHS = (0.05, 0.1, 0.2, 0.4)
ROWS = 8
# By kind, what a job trains; ranks that give about 140,000 parameters.
KINDS: dict[str, dict[str, Any]] = {
    "LoRA, q and v, rank 2": {"lora": LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj"))},
    "linked residual, rank 4": {"residual": ResidualConfig(r=4, alpha=8.0)},
    "LoReFT, rank 4, f7+l7": {"reft": ReftConfig(r=4)},
}


def train(model: MultiLoraModel, options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The kind with each learning rate, and of the best the processor's minutes, bytes and held-out loss."""
    found = []
    for rate in options.rates:
        name = f"{kind.split(',')[0].replace(' ', '-')}-{rate:g}"
        job = AdapterJob(
            name=name,
            data=Path(options.data) / "train.jsonl",
            eval_data=Path(options.data) / "valid.jsonl",
            steps=StepsConfig(max_steps=options.steps, batch_size=16),
            optimizer=OptimizerConfig(learning_rate=rate),
            evaluation=EvaluationConfig(eval_every=options.steps, eval_records=64),
            **KINDS[kind],
        )
        start = time.process_time()
        config = TrainConfig(output=options.output / name, plots=False, prompt_centroids=False)
        (result,) = train_adapters(model, model.tokenizer, jobs=[job], config=config)
        minutes = (time.process_time() - start) / 60
        weights = [*result.folder.glob("*_model.safetensors")]
        num_bytes = sum(file.stat().st_size for file in weights)
        found.append({"rate": rate, "minutes": minutes, "bytes": num_bytes, "loss": result.eval_losses[-1]})
        found[-1]["folder"] = result.folder
        console.print(
            f"{kind}, learning rate {rate:g}: held-out loss {result.eval_losses[-1]:.3f}, {minutes:.1f} minutes"
        )
    return min(found, key=lambda one: one["loss"])


def learn_vector(model: MultiLoraModel, options: argparse.Namespace) -> dict[str, Any]:
    """A vector, and its strength by validation questions."""
    start = time.process_time()
    questions = read_questions(Path(options.data) / "train.jsonl", options.pairs)
    pairs = []
    for number, question in enumerate(questions):
        wrong = [label for label in LABELS if label != question.answer][number % 2]
        chat = as_chat(model.tokenizer, question.prompt)
        pairs.append((chat + question.answer, chat + wrong))
    linked = model.registry.linked
    vector = block_vector_from_pairs(model.base, linked.sites, linked.identity, model.tokenizer, pairs)
    folder = options.output / "vector"
    write_residual(vector, folder)
    model.load_residual("vector", folder)
    known = read_questions(Path(options.data) / "valid.jsonl", options.questions // 2)
    scores = evaluate(model, known, [f"vector:{strength}" for strength in STRENGTHS])
    best = max(range(len(STRENGTHS)), key=lambda i: (scores[i].exact, scores[i].among_labels))
    num_bytes = (folder / "residual_model.safetensors").stat().st_size
    minutes = (time.process_time() - start) / 60
    return {"choice": f"vector:{STRENGTHS[best]}", "minutes": minutes, "bytes": num_bytes}


def costs(model: MultiLoraModel, choices: dict[str, str], options: argparse.Namespace) -> dict[str, float]:
    """Of the throughput of base rows, that of 8 rows of each choice."""
    prompts = [f"Material number {row}: is its bulk modulus low, medium or high?" for row in range(ROWS)]
    sampling = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
    with Engine(model, EngineConfig(prefix_cache=False)) as engine:

        def timed(choice: str | None) -> Callable[[], float]:
            asked = [Request(prompt, adapters=choice, sampling=sampling) for prompt in prompts]

            def run() -> float:
                start = time.process_time()
                engine.generate(asked)
                return ROWS * options.tokens / (time.process_time() - start)

            run()  # warms up
            return run

        figures = alternate({"base": timed(None)} | {kind: timed(c) for kind, c in choices.items()}, options.rounds)
    return {
        kind: statistics.median(own / base for own, base in zip(figures[kind], figures["base"], strict=True))
        for kind in choices
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/materials")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 6e-3])
    parser.add_argument("--pairs", type=int, default=64, help="of texts, for the vector")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24, help="of each row, for the cost")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/kinds"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(options.output, ignore_errors=True)
    model = MultiLoraModel.from_pretrained("smollm2-135m", dtype="bfloat16")
    kinds: dict[str, dict[str, Any]] = {"vector": learn_vector(model, options)}
    for number, kind in enumerate(KINDS):
        kinds[kind] = train(model, options, kind) | {"choice": f"trained{number}"}
        load = model.load_adapter if number == 0 else model.load_residual
        load(f"trained{number}", kinds[kind].pop("folder"))
    questions: list[Question] = read_questions(Path(options.data) / "test.jsonl", options.questions)
    choices = {kind: one["choice"] for kind, one in kinds.items()}
    scores = evaluate(model, questions, [None, *choices.values()])
    ratios = costs(model, choices, options)
    results = {"base": {"exact": scores[0].exact, "among_labels": scores[0].among_labels}}
    for (kind, one), score in zip(kinds.items(), scores[1:], strict=True):
        error = math.sqrt(score.exact * (1 - score.exact) / len(questions))
        results[kind] = one | {"exact": score.exact, "error": error, "among_labels": score.among_labels}
        results[kind]["throughput"] = ratios[kind]
    print_table(
        f"{options.steps} steps of 16 records, {len(questions)} test questions",
        ["adapter", "exact", "among labels", "CPU minutes", "kB", "of base throughput"],
        [
            [kind, f"{r['exact']:.3f}", f"{r['among_labels']:.3f}"]
            + (
                [f"{r['minutes']:.1f}", f"{r['bytes'] / 1000:.0f}", f"{r['throughput']:.2f}"]
                if "bytes" in r
                else [""] * 3
            )
            for kind, r in results.items()
        ],
    )
    workload = {name: getattr(options, name) for name in ("data", "steps", "rates", "pairs", "questions", "tokens")}
    save("adapter_kinds", workload, results)


if __name__ == "__main__":
    main()
