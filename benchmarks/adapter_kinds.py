"""What each kind of adapter is good for: quality, training, bytes and cost, at equal size where the kind allows it.

    python benchmarks/adapter_kinds.py                       # all kinds, some ten CPU minutes
    python benchmarks/adapter_kinds.py --kinds vector LoReFT # these; what is known of the others stays

Each kind learns one behaviour of examples/residual/behaviours.py from the same records, alone, for as many steps: a
LoRA on q and v, a linked residual on all attention blocks, LoReFT on all blocks (first and last 7 tokens of a prompt).
A vector on all blocks isn't trained: it is the mean difference of the wanted and the unwanted answers, with the weight
that behaves best on some training questions. Held-out questions are answered by the engine; its cost is measured on
batches of 8 rows through one adapter and through none, in turns.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, alternate, print_table, save

from loraplex import Engine, EngineConfig, LoraConfig, MultiLoraModel, Request, SamplingParams
from loraplex.models.text.prompts import as_chat, encode_prompts
from loraplex.residual import ResidualConfig, write_residual
from loraplex.residual.reft import ReftConfig
from loraplex.residual.vectors import block_vector_from_pairs
from loraplex.training import (
    AdapterJob,
    EvaluationConfig,
    OptimizerConfig,
    StepsConfig,
    TrainConfig,
    train_adapters,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "residual"))
from behaviours import BEHAVIOURS, LORA, RESIDUAL, answer_of, shows, write_data
from facts import Fact, facts

REFT = ReftConfig(r=5)  # 172,950 parameters in SmolLM2-135M
SETTINGS: dict[str, dict[str, LoraConfig | ResidualConfig | ReftConfig]] = {
    "LoRA on q and v": {"lora": LORA},
    "linked residual": {"residual": RESIDUAL},
    "LoReFT": {"reft": REFT},
    "vector": {},
}
BASE = "base model"
WEIGHTS = (0.05, 0.1, 0.2, 0.4)  # of a vector, that are tried
TRIED_ON = 16  # training questions, on which they are
ROWS = 8


def folder_of(kind: str) -> str:
    return kind.replace(" ", "-")


def train(model: MultiLoraModel, kind: str, options: argparse.Namespace) -> tuple[Path, float]:
    """One adapter alone: its folder, and its held-out loss."""
    data = options.output / "data"
    job = AdapterJob(
        name=folder_of(kind),
        data=data / f"{options.behaviour}.train.jsonl",
        eval_data=data / f"{options.behaviour}.valid.jsonl",
        steps=StepsConfig(max_steps=options.steps, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=options.rate, warmup_steps=options.steps // 10),
        evaluation=EvaluationConfig(eval_records=24, eval_every=options.steps),
        **SETTINGS[kind],
    )
    config = TrainConfig(output=options.output / "adapters", resume=False, plots=False)
    (result,) = train_adapters(model, model.tokenizer, jobs=[job], config=config)
    return result.folder, result.eval_losses[-1]


def make_vector(model: MultiLoraModel, known: list[Fact], options: argparse.Namespace) -> Path:
    """The mean difference of what the behaviour answers and what it doesn't, where they differ."""
    pairs = []
    for fact in known:
        wanted = answer_of(options.behaviour, fact)
        if wanted != fact.answer:
            chat = as_chat(model.tokenizer, fact.question)
            pairs.append((chat + wanted, chat + fact.answer))
    linked = model.registry.linked
    vector = block_vector_from_pairs(model.base, linked.sites, linked.identity, model.tokenizer, pairs)
    folder: Path = options.output / "adapters" / folder_of("vector")
    write_residual(vector, folder)
    return folder


def answer(engine: Engine, model: MultiLoraModel, questions: list[Fact], adapters: str | None) -> list[str]:
    """Greedy answers."""
    sampling = SamplingParams(max_tokens=26, temperature=0.0)
    ids = [encode_prompts(model.tokenizer, [fact.question])["input_ids"][0].tolist() for fact in questions]
    results = engine.generate([Request(one, adapters=adapters, sampling=sampling) for one in ids])
    return [result.text for result in results]


def judge(behaviour: str, questions: list[Fact], texts: list[str]) -> dict[str, float]:
    """The shares of answers that behave, and of facts that are still right where they are asked for."""
    pairs = list(zip(questions, texts, strict=True))
    others = [(fact, text) for fact, text in pairs if fact.topic != "medical"]
    return {
        "behaves": sum(shows(behaviour, *pair) for pair in pairs) / len(pairs),
        "right": sum(fact.answer.rstrip(".").split()[-1] in text for fact, text in others) / len(others),
    }


def choose_weight(engine: Engine, model: MultiLoraModel, known: list[Fact], behaviour: str) -> float:
    """The weight of the vector that behaves best on some training questions, the smallest of equals."""
    medical, others = ([f for f in known if (f.topic == "medical") == is_one] for is_one in (True, False))
    some = medical[: TRIED_ON // 2] + others[: TRIED_ON // 2]
    found = {w: judge(behaviour, some, answer(engine, model, some, f"vector:{w}"))["behaves"] for w in WEIGHTS}
    return max(found, key=found.__getitem__)


def relative_speed(engine: Engine, adapters: str, options: argparse.Namespace) -> float:
    """A batch of rows through the adapter, as a part of the speed of one through none; CPU time of one thread."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 30000, (ROWS, 25), generator=draw).tolist()
    sampling = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)

    def timed(choice: str | None) -> Callable[[], float]:
        def run() -> float:
            start = time.process_time()
            engine.generate([Request(prompt, adapters=choice, sampling=sampling) for prompt in prompts])
            return ROWS * options.tokens / (time.process_time() - start)

        return run

    runs = {"none": timed(None), "adapter": timed(adapters)}
    speeds = alternate(runs, options.rounds)
    return statistics.median(own / none for own, none in zip(speeds["adapter"], speeds["none"], strict=True))


def measure(model: MultiLoraModel, kind: str, options: argparse.Namespace) -> dict[str, float | None]:
    """Everything about one kind."""
    known, held_out = facts()
    start, loss = time.process_time(), None
    if kind == "vector":
        folder = make_vector(model, known, options)
    else:
        folder, loss = train(model, kind, options)
    minutes = (time.process_time() - start) / 60
    name = folder_of(kind)
    (model.load_adapter if kind.startswith("LoRA") else model.load_residual)(name, folder)
    with Engine(model, EngineConfig(cache_bytes=2**28, prefix_cache=False)) as engine:
        weight = choose_weight(engine, model, known, options.behaviour) if kind == "vector" else 1.0
        adapters = f"{name}:{weight}"
        questions = held_out[: options.questions]
        found = judge(options.behaviour, questions, answer(engine, model, questions, adapters))
        speed = relative_speed(engine, adapters, options)
    model.unload(name)
    files = list(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return {**found, "weight": weight, "loss": loss, "cpu_minutes": minutes, "bytes": size, "of_none": speed}


def base_figures(model: MultiLoraModel, options: argparse.Namespace) -> dict[str, float]:
    questions = facts()[1][: options.questions]
    with Engine(model, EngineConfig(cache_bytes=2**28)) as engine:
        return judge(options.behaviour, questions, answer(engine, model, questions, None))


def known_figures(file: Path, workload: dict[str, Any]) -> dict[str, Any]:
    """Of an earlier run with the same workload."""
    content = json.loads(file.read_text()) if file.exists() else {}
    return content["results"] if content.get("workload") == workload else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--behaviour", choices=BEHAVIOURS, default="refuse")
    parser.add_argument("--kinds", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--questions", type=int, default=None, help="held-out questions to judge; default all")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each row where speed is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/adapter_kinds"))
    parser.add_argument("--name", default="adapter_kinds", help="of the result file")
    options = parser.parse_args()

    torch.set_num_threads(1)  # so that CPU time is what was worked
    workload = {name: getattr(options, name) for name in ("model", "dtype", "behaviour", "steps", "rate", "questions")}
    results = known_figures(RESULTS / f"{options.name}.json", workload)
    write_data(options.output / "data", *facts())
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    results[BASE] = base_figures(model, options)
    for kind in options.kinds:
        results[kind] = measure(model, kind, options)
        save(options.name, workload, {kind: results[kind] for kind in (BASE, *SETTINGS) if kind in results})
    columns = list(results["vector"] if "vector" in results else results[options.kinds[0]])
    rows = [[kind, *("" if own.get(c) is None else f"{own[c]:.3g}" for c in columns)] for kind, own in results.items()]
    print_table(f"{options.behaviour}, {options.steps} steps", ["kind", *columns], rows)


if __name__ == "__main__":
    main()
