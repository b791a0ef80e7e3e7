"""How fast do several adapters train in one batch, against PEFT training one after the other?

python benchmarks/training.py               # 4 adapters; SmolLM2, and a random Llama of 1.1B parameters
python benchmarks/training.py --cases 135m:float32:16 --rounds 3 --clock cpu --no-save

A case is SHAPE:DTYPE:BATCH_SIZE. PEFT trains in the usual loop: records padded to the longest of the batch, the loss
that transformers computes from `labels`, no cache, AdamW with one fused update, nothing checkpointed. Its sides are
torch's default attention and eager attention with adapters in float32, as PEFT makes them and loraplex has them, and
eager attention with adapters in the base model's 16 bits (autocast_adapter_dtype=False), which lose small updates. Both
take the same records in the same steps, and the speed counts the records' tokens, without padding. One round is one
optimizer step of every adapter; sides alternate. PEFT's adapters share one base model; the time to switch between them,
which one run after the other doesn't have, is not counted.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import alternate, console, medians, print_table, save
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from loraplex import LoraConfig
from loraplex.layers.attach import AdaptableModel
from loraplex.models.checkpoints.loading import load_base_model, load_tokenizer
from loraplex.training import AdapterJob, EvaluationConfig, StepsConfig, TrainConfig
from loraplex.training.adapters.job_state import JobState
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.task import AdapterTask
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.trainer import Trainer
from loraplex.training.data.examples import Example
from loraplex.training.forward.fast_passes import fast_passes

ROOT = Path(__file__).parents[1]
DOMAINS = ("quantum", "materials", "protein", "peptides")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 16
STEPS = 100  # of the schedule; a benchmark takes fewer
SHAPES = {
    "1.1b": {  # TinyLlama's
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make_jobs(batch_size: int) -> list[AdapterJob]:
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    return [
        AdapterJob(
            name=domain,
            data=ROOT / "data" / domain / "train.jsonl",
            lora=lora,
            steps=StepsConfig(max_steps=STEPS, batch_size=batch_size),
            evaluation=EvaluationConfig(eval_fraction=0),
        )
        for domain in DOMAINS
    ]


def padded(examples: list[Example]) -> dict[str, Tensor]:
    longest = max(len(example.ids) for example in examples)
    ids = torch.tensor([[*e.ids, *[0] * (longest - len(e.ids))] for e in examples])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in examples])
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        labels[row, list(example.answer)] = ids[row, list(example.answer)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class PeftLoop:
    """One adapter alone, on a base model that others use in their turn."""

    def __init__(self, model: PeftModel, adapter: str, state: JobState) -> None:
        self.model, self.adapter, self.data = model, adapter, state.data
        model.set_adapter(adapter)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, state.job.optimizer.learning_rate, weight_decay=0, fused=True)

    def step(self, step: int) -> float:
        loss = self.model(**padded(self.data.examples_of_step(step)), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def make_loops(base: PreTrainedModel, states: list[JobState], *, autocast: bool) -> list[PeftLoop]:
    """One for each state; the adapters are in float32, or with `autocast` off in the base model's dtype."""
    config = PeftConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    first, *others = (f"{state.name}-{'float32' if autocast else 'own'}" for state in states)
    if isinstance(base, PeftModel):
        base.add_adapter(first, config, autocast_adapter_dtype=autocast)
    else:
        base = get_peft_model(base, config, adapter_name=first, autocast_adapter_dtype=autocast)
    for other in others:
        base.add_adapter(other, config, autocast_adapter_dtype=autocast)
    return [PeftLoop(base, name, state) for name, state in zip([first, *others], states, strict=True)]


def load(shape: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2, or a model of TinyLlama's shape with random weights and SmolLM2's vocabulary."""
    small, source = load_base_model("smollm2-135m", dtype=dtype, device="cpu")
    tokenizer = load_tokenizer(source)
    if shape == "135m":
        return small, tokenizer
    config = LlamaConfig(**SHAPES[shape], vocab_size=small.config.vocab_size)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer
    finally:
        torch.set_default_dtype(default)


def make_trainer(
    adaptable: AdaptableModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    folder: Path,
    *,
    packing: bool,
) -> tuple[Trainer, list[JobState]]:
    states = make_states(make_jobs(batch_size), base, adaptable, tokenizer)
    adaptable.attach([path for state in states for path in state.parameters.paths])
    ranks = ProcessGroup(base.device)
    task = AdapterTask(base, states, TrainConfig(output=folder, packing=packing), ranks)
    log_bytes = [0 for _ in states]
    return Trainer(task, log_bytes, ranks, output=folder, checkpoint_every=STEPS, identity={}), states


class Race:
    """The sides take the same steps; each counts the records' tokens."""

    def __init__(self, shape: str, dtype: str, batch_size: int, folder: Path, now: Callable[[], float]) -> None:
        base, tokenizer = load(shape, dtype)
        self.base = base.eval().requires_grad_(False)
        adaptable = AdaptableModel(self.base)
        self.trainers = {
            packing: make_trainer(adaptable, self.base, tokenizer, batch_size, folder / str(packing), packing=packing)
            for packing in (False, True)
        }
        _, self.states = self.trainers[False]
        self.longest = max(len(example.ids) for state in self.states for example in state.data.train)
        self.loops = {True: make_loops(load(shape, dtype)[0], self.states, autocast=True)}
        if dtype != "float32":
            self.loops[False] = make_loops(self.loops[True][0].model, self.states, autocast=False)
        self._now = now
        self._step: dict[str, int] = {}
        self.first_losses: dict[str, list[float]] = {}

    def run_ours(self, *, packing: bool) -> float:
        trainer, states = self.trainers[packing]

        def step(number: int) -> tuple[list[float], float]:
            start = self._now()
            trainer.step(range(len(states)))
            return [state.progress.train_losses[-1] for state in states], self._now() - start

        with fast_passes(self.base, self.longest, packing=packing):
            return self._speed("packed" if packing else "ours", step)

    def run_theirs(self, attention: str, *, autocast: bool) -> float:
        def step(number: int) -> tuple[list[float], float]:
            losses, seconds = [], 0.0
            for loop in self.loops[autocast]:
                loop.model.set_adapter(loop.adapter)
                start = self._now()
                losses.append(loop.step(number))
                seconds += self._now() - start
            return losses, seconds

        self.loops[autocast][0].model.get_base_model().set_attn_implementation(attention)
        return self._speed(f"theirs, {autocast}", step)

    def _speed(self, side: str, step: Callable[[int], tuple[list[float], float]]) -> float:
        number = self._step.get(side, 0)
        tokens = sum(len(e.ids) for state in self.states for e in state.data.examples_of_step(number))
        losses, seconds = step(number)
        self._step[side] = number + 1
        self.first_losses.setdefault(side, losses)
        return tokens / seconds


def measure(shape: str, dtype: str, batch_size: int, rounds: int, clock: str) -> dict[str, float]:
    """Medians of tokens/s of PEFT, one adapter after the other, and of loraplex, all in one batch."""
    with tempfile.TemporaryDirectory() as folder:
        race = Race(shape, dtype, batch_size, Path(folder), CLOCKS[clock])
        sides: dict[str, Callable[[], float]] = {
            "peft": lambda: race.run_theirs("sdpa", autocast=True),
            "peft_eager": lambda: race.run_theirs("eager", autocast=True),
            "loraplex": lambda: race.run_ours(packing=False),
            "loraplex_packed": lambda: race.run_ours(packing=True),
        }
        if dtype != "float32":
            sides["peft_16_bit_adapters"] = lambda: race.run_theirs("eager", autocast=False)
        figures = alternate(sides, rounds)
    # lora_b starts as zero, so the first step's loss is the base model's: all sides see the same tokens.
    theirs = torch.tensor(race.first_losses["theirs, True"])
    for side, losses in race.first_losses.items():
        assert torch.allclose(torch.tensor(losses), theirs, rtol=0.02), f"{side} trains on other tokens: {losses}"
    return medians(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["135m:bfloat16:4", "135m:bfloat16:16", "1.1b:bfloat16:4"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a machine that others use too"
    )
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for case in options.cases:
        shape, dtype, batch_size = case.split(":")
        console.print(f"{shape}: {len(DOMAINS)} adapters, batch size {batch_size} each, {dtype} ...")
        speeds = measure(shape, dtype, int(batch_size), options.rounds, options.clock)
        results.append({"model": shape, "dtype": dtype, "batch_size": int(batch_size), "tokens_per_s": speeds})
    show(results)
    if not options.no_save:
        workload = vars(options) | {"domains": DOMAINS, "rank": RANK, "targets": TARGETS}
        save("training", workload, results)


def show(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        speeds = result["tokens_per_s"]
        better = max(speeds["peft"], speeds["peft_eager"])
        of_16_bit = speeds.get("peft_16_bit_adapters")
        sides = (speeds["peft"], speeds["peft_eager"], of_16_bit, speeds["loraplex"], speeds["loraplex_packed"])
        ratios = (
            speeds["loraplex"] / better,
            speeds["loraplex_packed"] / better,
            None if of_16_bit is None else speeds["loraplex"] / of_16_bit,
        )
        case = f"{result['model']}, {result['dtype']}, batch size {result['batch_size']}"
        cells = ["-" if speed is None else f"{speed:.0f}" for speed in sides]
        rows.append([case, *cells, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    print_table(
        f"training {len(DOMAINS)} adapters, rank {RANK} on {', '.join(TARGETS)}; tokens/s",
        [
            "case",
            "PEFT",
            "PEFT, eager attention",
            "PEFT, 16-bit adapters",
            "loraplex",
            "loraplex, packed",
            "loraplex / better PEFT",
            "packed / better PEFT",
            "loraplex / 16-bit PEFT",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
