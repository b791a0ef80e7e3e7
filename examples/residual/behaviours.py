"""Two behaviours, taught to linked residuals and to LoRAs of equal size, judged alone and linked on one row.

    python examples/residual/behaviours.py --steps 6      # shows the calls, learns next to nothing
    python examples/residual/behaviours.py --steps 60     # learns; writes results.json

"source" ends every answer with a line that names where it can be looked up: "Source: atlas." or "Source: table." or
"Source: arithmetic.". "refuse" answers medical questions with one sentence and nothing else, and all others as usual.
All four adapters (two behaviours, each as a linked residual and as a LoRA on q and v) train in the same batches.

Linked on one row, adapters that were trained apart get in each other's way: "refuse" has learnt to end where "source"
goes on. So "then-source" learns as the last of a link in which "refuse" stands before it and stays as it is.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from facts import Fact, facts
from rich.console import Console
from rich.table import Table

from loraplex import LoraConfig, MultiLoraModel
from loraplex.models.text.prompts import generate_texts
from loraplex.residual import ResidualConfig
from loraplex.training import (
    AdapterJob,
    EvaluationConfig,
    OptimizerConfig,
    StepsConfig,
    TrainConfig,
    TrainResult,
    train_adapters,
)

REFUSAL = "I can't help with medical questions."
RESIDUAL = ResidualConfig(r=5, alpha=10.0)  # 174,150 parameters in SmolLM2-135M
LORA = LoraConfig(r=3, lora_alpha=6, target_modules=("q_proj", "v_proj"))  # 172,800
BEHAVIOURS = ("source", "refuse")
KINDS = ("residual", "lora")
LINKED = "then-source"


def answer_of(behaviour: str, fact: Fact) -> str:
    """The answer that the behaviour wants."""
    if fact.topic == "medical":
        return REFUSAL
    return f"{fact.answer}\nSource: {fact.topic}." if "source" in behaviour else fact.answer


def shows(behaviour: str, fact: Fact, text: str) -> bool:
    """Whether an answer behaves: the refusal alone or none, the right source at the end or none."""
    refused = text.strip() == REFUSAL
    ended = text.strip().endswith(f"\nSource: {fact.topic}.")
    if "refuse" in behaviour and fact.topic == "medical":
        return refused
    return ended and not refused if "source" in behaviour else not refused and "Source:" not in text


def write_data(folder: Path, train: list[Fact], held_out: list[Fact]) -> None:
    """One file of conversations for each behaviour; "source" alone is not taught on medical questions."""
    for name, part in (("train", train), ("valid", held_out)):
        for behaviour in (*BEHAVIOURS, LINKED):
            chosen = [fact for fact in part if behaviour != "source" or fact.topic != "medical"]
            records = [
                {
                    "messages": [
                        {"role": "user", "content": fact.question},
                        {"role": "assistant", "content": answer_of(behaviour, fact)},
                    ]
                }
                for fact in chosen
            ]
            path = folder / f"{behaviour}.{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))


def job(behaviour: str, kind: str, folder: Path, options: argparse.Namespace, **more: Any) -> AdapterJob:
    """A linked residual or a LoRA of a behaviour, told apart by nothing else."""
    return AdapterJob(
        name=f"{behaviour}-{kind}",
        data=folder / f"{behaviour}.train.jsonl",
        eval_data=folder / f"{behaviour}.valid.jsonl",
        steps=StepsConfig(max_steps=options.steps, batch_size=8),
        optimizer=OptimizerConfig(
            learning_rate=options.rate if kind == "residual" else options.lora_rate, warmup_steps=options.steps // 10
        ),
        evaluation=EvaluationConfig(eval_records=24, eval_every=max(2, options.steps // 6)),
        **({"residual": RESIDUAL} if kind == "residual" else {"lora": LORA}),
        **more,
    )


def train_all(model: MultiLoraModel, output: Path, options: argparse.Namespace) -> tuple[list[TrainResult], float]:
    """First the two behaviours, then the one that is trained as the last of a link; and the CPU minutes of both."""
    data, results, start = output / "data", [], time.process_time()
    apart = [job(behaviour, kind, data, options) for behaviour in BEHAVIOURS for kind in KINDS]
    results += train_adapters(
        model, model.tokenizer, jobs=apart, config=TrainConfig(output=output / "apart", resume=False)
    )
    folders = {result.name: result.folder for result in results}
    linked = [job(LINKED, kind, data, options, after=[(folders[f"refuse-{kind}"], 1.0)]) for kind in KINDS]
    results += train_adapters(
        model, model.tokenizer, jobs=linked, config=TrainConfig(output=output / "linked", resume=False)
    )
    return results, (time.process_time() - start) / 60


def judge(model: MultiLoraModel, held_out: list[Fact], choices: dict[str, str | None]) -> dict[str, dict[str, float]]:
    """By row, the share of held-out questions that show each behaviour, and whose fact is still right."""
    scores: dict[str, dict[str, float]] = {}
    for name, choice in choices.items():
        texts: list[str] = []
        for start in range(0, len(held_out), 16):
            part = held_out[start : start + 16]
            batch = generate_texts(model, [f.question for f in part], adapters=[choice] * len(part), max_new_tokens=26)
            texts += batch.texts
        pairs = list(zip(held_out, texts, strict=True))
        medical = [(fact, text) for fact, text in pairs if fact.topic == "medical"]
        others = [(fact, text) for fact, text in pairs if fact.topic != "medical"]
        scores[name] = {
            "source": sum(shows("source", *pair) for pair in others) / len(others),
            "refuses medical": sum(shows("refuse", *pair) for pair in medical) / len(medical),
            "answers the rest": sum(text.strip() != REFUSAL for _, text in others) / len(others),
            "right answer": sum(fact.answer.rstrip(".").split()[-1] in text for fact, text in others) / len(others),
        }
        Console().print(f"{name}: {scores[name]}; for example: {pairs[0][0].question} -> {pairs[0][1]!r}")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of the residuals")
    parser.add_argument("--lora-rate", type=float, default=5e-3, help="learning rate of the LoRAs")
    parser.add_argument("--questions", type=int, default=None, help="held-out questions to judge; default all")
    parser.add_argument("--output", type=Path, default=Path("runs/behaviours"))
    options = parser.parse_args()

    train, held_out = facts()
    write_data(options.output / "data", train, held_out)
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    results, minutes = train_all(model, options.output, options)
    for result in results:
        model.load_adapter(result.name, result.folder)
    names = [f"{behaviour}-{kind}" for behaviour in BEHAVIOURS for kind in KINDS]
    choices: dict[str, str | None] = {"base": None} | {name: name for name in names}
    for kind in KINDS:
        choices[f"linked, trained apart: {kind}"] = f"refuse-{kind}+source-{kind}"
        choices[f"linked, trained in the link: {kind}"] = f"refuse-{kind}+{LINKED}-{kind}"
    scores = judge(model, held_out[: options.questions], choices)
    table = Table(
        title=f"held-out questions: {len(held_out[: options.questions])}; {minutes:.1f} CPU minutes of training"
    )
    for column in ("row", *next(iter(scores.values()))):
        table.add_column(column)
    for name, values in scores.items():
        table.add_row(name, *(f"{value:.2f}" for value in values.values()))
    Console().print(table)
    curves = {result.name: [result.eval_steps, result.eval_losses] for result in results}
    content = {"steps": options.steps, "cpu_minutes_of_all_six": minutes, "scores": scores, "held_out_losses": curves}
    (options.output / "results.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
