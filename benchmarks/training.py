"""How fast do several adapters train in one batch, against PEFT training one after the other?

python benchmarks/training.py               # 4 adapters; batch size 4 and 16; fp32 and bf16

PEFT trains in the usual loop: records padded to the longest of the batch, the loss that transformers computes from
`labels`, AdamW with one fused update. Both sides take the same records in the same steps, and the speed counts the
records' tokens, without padding. One round is one optimizer step of every adapter; sides alternate.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import alternate, console, medians, print_table, save
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from loraplex import LoraConfig, MultiLoraModel
from loraplex.models.checkpoints.loading import load_base_model
from loraplex.training import AdapterJob, EvaluationConfig, StepsConfig, TrainConfig
from loraplex.training.adapters.job_state import JobState
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.task import AdapterTask
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.trainer import Trainer
from loraplex.training.data.examples import Example
from loraplex.training.forward.attention import fast_attention

ROOT = Path(__file__).parents[1]
DOMAINS = ("quantum", "materials", "protein", "peptides")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 16
STEPS = 100  # of the schedule; a benchmark takes fewer
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
    """One adapter alone."""

    def __init__(self, base: PreTrainedModel, state: JobState) -> None:
        config = PeftConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config, adapter_name=state.job.name)
        self.data = state.data
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, state.job.optimizer.learning_rate, weight_decay=0, fused=True)

    def step(self, step: int) -> float:
        loss = self.model(**padded(self.data.examples_of_step(step))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def make_trainer(
    model: MultiLoraModel, batch_size: int, folder: Path, *, packing: bool
) -> tuple[Trainer, list[JobState]]:
    states = make_states(make_jobs(batch_size), model.base, model.adaptable, model.tokenizer)
    model.adaptable.attach([path for state in states for path in state.parameters.paths])
    ranks = ProcessGroup(model.base.device)
    task = AdapterTask(model.base, states, TrainConfig(output=folder, packing=packing), ranks)
    log_bytes = [0 for _ in states]
    return Trainer(task, log_bytes, ranks, output=folder, checkpoint_every=STEPS, identity={}), states


class Race:
    """The sides take the same steps; each counts the records' tokens."""

    def __init__(self, model_name: str, dtype: str, batch_size: int, folder: Path, now: Callable[[], float]) -> None:
        self.ours = MultiLoraModel.from_pretrained(model_name, dtype=dtype)
        self.trainer, self.states = make_trainer(self.ours, batch_size, folder, packing=False)
        self.packed, self.packed_states = make_trainer(self.ours, batch_size, folder / "packed", packing=True)
        base, _ = load_base_model(model_name, dtype=dtype, device="cpu")
        self.loops = [PeftLoop(copy.deepcopy(base), state) for state in self.states]
        self._now = now
        self._step = {"ours": 0, "packed": 0, "theirs": 0}
        self.first_losses: dict[str, list[float]] = {}

    def run_ours(self) -> float:
        def step(number: int) -> list[float]:
            self.trainer.step(range(len(self.states)))
            return [state.progress.train_losses[-1] for state in self.states]

        with fast_attention(self.ours.base, longest=128):
            return self._timed("ours", step)

    def run_packed(self) -> float:
        def step(number: int) -> list[float]:
            self.packed.step(range(len(self.packed_states)))
            return [state.progress.train_losses[-1] for state in self.packed_states]

        with fast_attention(self.ours.base, longest=128, packing=True):
            return self._timed("packed", step)

    def run_theirs(self, attention: str) -> float:
        for loop in self.loops:
            loop.model.get_base_model().set_attn_implementation(attention)
        return self._timed("theirs", lambda number: [loop.step(number) for loop in self.loops])

    def _timed(self, side: str, step: Callable[[int], list[float]]) -> float:
        number = self._step[side]
        tokens = sum(len(e.ids) for state in self.states for e in state.data.examples_of_step(number))
        start = self._now()
        losses = step(number)
        seconds = self._now() - start
        self._step[side] += 1
        self.first_losses.setdefault(side, losses)
        return tokens / seconds


def measure(model_name: str, dtype: str, batch_size: int, rounds: int, clock: str) -> dict[str, float]:
    """Medians of tokens/s of PEFT, one adapter after the other, and of loraplex, all in one batch."""
    with tempfile.TemporaryDirectory() as folder:
        race = Race(model_name, dtype, batch_size, Path(folder), CLOCKS[clock])
        figures = alternate(
            {
                "peft": lambda: race.run_theirs("sdpa"),
                "peft_eager": lambda: race.run_theirs("eager"),
                "loraplex": race.run_ours,
                "loraplex_packed": race.run_packed,
            },
            rounds,
        )
    # lora_b starts as zero, so the first step's loss is the base model's: both sides see the same tokens.
    theirs = torch.tensor(race.first_losses["theirs"])
    for ours in map(torch.tensor, (race.first_losses["ours"], race.first_losses["packed"])):
        assert torch.allclose(ours, theirs, rtol=0.02), f"the sides train on different tokens: {ours} and {theirs}"
    return medians(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", default=["float32:4", "float32:16", "bfloat16:4", "bfloat16:16"])
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
        dtype, batch_size = case.split(":")
        console.print(f"{len(DOMAINS)} adapters, batch size {batch_size} each, {dtype} ...")
        speeds = measure(options.model, dtype, int(batch_size), options.rounds, options.clock)
        results.append({"dtype": dtype, "batch_size": int(batch_size), "tokens_per_s": speeds})
    show(options.model, results)
    if not options.no_save:
        workload = vars(options) | {"domains": DOMAINS, "rank": RANK, "targets": TARGETS}
        save("training", workload, results)


def show(model: str, results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        speeds = result["tokens_per_s"]
        better = max(speeds["peft"], speeds["peft_eager"])
        ratios = [speeds["loraplex"] / speeds["peft"], speeds["loraplex"] / better, speeds["loraplex_packed"] / better]
        case = f"{result['dtype']}, batch size {result['batch_size']}"
        rows.append([case, *(f"{speed:.0f}" for speed in speeds.values()), *(f"{ratio:.2f}" for ratio in ratios)])
    print_table(
        f"{model}: training {len(DOMAINS)} adapters, rank {RANK} on {', '.join(TARGETS)}; tokens/s",
        [
            "case",
            "PEFT",
            "PEFT, eager attention",
            "loraplex",
            "loraplex, packed",
            "loraplex / PEFT",
            "loraplex / better PEFT",
            "packed / better PEFT",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
