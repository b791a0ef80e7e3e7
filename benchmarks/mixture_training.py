"""How fast does the scaling head of a mixture train, against PEFT's X-LoRA on the same records?

python benchmarks/mixture_training.py       # 4 experts on all 7 targets, batch size 16; fp32 and bf16

PEFT trains in the usual loop: records padded to the longest of the batch, the loss that transformers computes from
`labels`, AdamW with one fused update on the head's parameters. Both sides take the same records in the same steps; the
speed counts the records' tokens, without padding. The hidden states of loraplex's scaling pass are computed before the
clock starts, as in every epoch after the first; `first epoch` adds their time to the steps'. Sides alternate.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from adapters import ALL_TARGETS, write_random_adapters
from common import alternate, console, medians, print_table, save
from torch import Tensor

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.models.checkpoints.loading import load_base_model
from loraplex.training import DataSource, EvaluationConfig, MixtureTrainConfig, StepsConfig, TrainConfig
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.trainer import Trainer
from loraplex.training.data.examples import Example
from loraplex.training.forward.fast_passes import fast_passes
from loraplex.training.mixture.data import load_mixture_data
from loraplex.training.mixture.sources import as_sources
from loraplex.training.mixture.state import MixtureState
from loraplex.training.mixture.task import MixtureTask

ROOT = Path(__file__).parents[1]
DOMAINS = ("quantum", "materials", "protein", "peptides")
RANK = 16
STEPS = 100  # of the schedule; a benchmark takes fewer
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def padded(examples: list[Example]) -> dict[str, Tensor]:
    longest = max(len(example.ids) for example in examples)
    ids = torch.tensor([[*e.ids, *[0] * (longest - len(e.ids))] for e in examples])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in examples])
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        labels[row, list(example.answer)] = ids[row, list(example.answer)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class PeftLoop:
    """PEFT's X-LoRA; its experts must be named "0", "1", ..."""

    def __init__(self, model_name: str, dtype: str, experts: dict[str, Path], config: XLoraConfig) -> None:
        base, _ = load_base_model(model_name, dtype=dtype, device="cpu")
        base.config.use_cache = False
        settings = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters={str(number): str(path) for number, path in enumerate(experts.values())},
            layerwise_scalings=config.layerwise_scalings,
            xlora_depth=config.xlora_depth,
            xlora_size=config.xlora_size,
            xlora_dropout_p=config.xlora_dropout_p,
        )
        self.model = peft.get_peft_model(base, settings)
        self.head = self.model.base_model.internal_xlora_classifier
        self.trained = list(self.head.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, 1e-3, weight_decay=0, fused=True)

    def step(self, examples: list[Example]) -> float:
        loss = self.model(**padded(examples), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class Ours:
    """loraplex's trainer, with the hidden states of the steps to come computed."""

    def __init__(
        self, model_name: str, dtype: str, experts: dict[str, Path], xlora: XLoraConfig, batch_size: int, folder: Path
    ) -> None:
        self.model = MultiLoraModel.from_pretrained(model_name, dtype=dtype)
        for name, path in experts.items():
            self.model.load_adapter(name, path)
        self.model.create_mixture("science", list(experts), xlora)
        config = MixtureTrainConfig(
            run=TrainConfig(output=folder),
            steps=StepsConfig(max_steps=STEPS, batch_size=batch_size),
            evaluation=EvaluationConfig(eval_fraction=0),
        )
        sources = as_sources([DataSource(name=name, data=ROOT / "data" / name / "train.jsonl") for name in DOMAINS])
        vocab_size = self.model.base.config.vocab_size
        self.data = load_mixture_data("benchmark", sources, config, self.model.tokenizer, vocab_size)
        self.state = MixtureState(self.model, self.model.mixtures.get("science"), self.data, config)
        task, ranks = MixtureTask(self.model.base, self.state), ProcessGroup(self.model.base.device)
        self.hidden = task.hidden_states
        self.trainer = Trainer(task, [0], ranks, output=folder, checkpoint_every=STEPS, identity={})

    def step(self) -> float:
        self.trainer.step([0])
        return self.state.progress.train_losses[-1]


class Race:
    """The sides take the same steps; each counts the records' tokens."""

    def __init__(self, options: argparse.Namespace, dtype: str, batch_size: int, folder: Path) -> None:
        base, _ = load_base_model(options.model, dtype=dtype, device="cpu")
        experts = write_random_adapters(base, folder, [RANK] * len(DOMAINS))
        config = XLoraConfig(layerwise_scalings=options.layerwise, xlora_depth=options.depth, xlora_dropout_p=0.0)
        self.ours = Ours(options.model, dtype, experts, config, batch_size, folder)
        self.peft = PeftLoop(options.model, dtype, experts, config)
        head = self.ours.state.head.state_dict()
        self.peft.head.load_state_dict({name: tensor.clone() for name, tensor in head.items()})
        self._now = CLOCKS[options.clock]
        self._step = {"ours": 0, "theirs": 0}
        self.first_losses: dict[str, float] = {}
        self.fill_tokens_per_s = self._fill(options.rounds + 1)

    def run_ours(self) -> float:
        with fast_passes(self.ours.model.base, longest=128):
            return self._timed("ours", lambda examples: self.ours.step())

    def run_theirs(self, attention: str) -> float:
        self.peft.model.get_base_model().set_attn_implementation(attention)
        return self._timed("theirs", self.peft.step)

    def _fill(self, num_steps: int) -> float:
        examples = [row.example for step in range(num_steps) for row in self.ours.data.examples_of_step(step)]
        start = self._now()
        with fast_passes(self.ours.model.base, longest=128):
            self.ours.hidden.fill(examples, lambda done, total: None)
        return sum(len(example.ids) for example in examples) / (self._now() - start)

    def _timed(self, side: str, step: Callable[[list[Example]], float]) -> float:
        examples = [row.example for row in self.ours.data.examples_of_step(self._step[side])]
        start = self._now()
        loss = step(examples)
        seconds = self._now() - start
        self._step[side] += 1
        self.first_losses.setdefault(side, loss)
        return sum(len(example.ids) for example in examples) / seconds


def measure(options: argparse.Namespace, dtype: str, batch_size: int) -> dict[str, float]:
    """Medians of tokens/s of PEFT and of loraplex."""
    with tempfile.TemporaryDirectory() as folder:
        race = Race(options, dtype, batch_size, Path(folder))
        figures = alternate(
            {
                "peft": lambda: race.run_theirs("sdpa"),
                "peft_eager": lambda: race.run_theirs("eager"),
                "loraplex": race.run_ours,
            },
            options.rounds,
        )
    ours, theirs = race.first_losses["ours"], race.first_losses["theirs"]
    assert abs(ours - theirs) < 0.02 * theirs, f"the sides train on different things: losses {ours} and {theirs}"
    speeds = medians(figures)
    speeds["loraplex_first_epoch"] = 1 / (1 / speeds["loraplex"] + 1 / race.fill_tokens_per_s)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", default=["float32:4", "float32:16", "bfloat16:4", "bfloat16:16"])
    parser.add_argument("--layerwise", action="store_true")
    parser.add_argument("--depth", type=int, default=1)
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
        console.print(f"{len(DOMAINS)} experts, batch size {batch_size}, {dtype} ...")
        speeds = measure(options, dtype, int(batch_size))
        results.append({"dtype": dtype, "batch_size": int(batch_size), "tokens_per_s": speeds})
    show(options.model, results)
    if not options.no_save:
        workload = vars(options) | {"domains": DOMAINS, "rank": RANK, "targets": ALL_TARGETS}
        save("mixture_training", workload, results)


def show(model: str, results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        speeds = result["tokens_per_s"]
        ratios = [speeds["loraplex"] / speed for speed in (speeds["peft"], max(speeds["peft"], speeds["peft_eager"]))]
        case = f"{result['dtype']}, batch size {result['batch_size']}"
        rows.append([case, *(f"{speed:.0f}" for speed in speeds.values()), *(f"{ratio:.2f}" for ratio in ratios)])
    print_table(
        f"{model}: training the head of {len(DOMAINS)} experts of rank {RANK} on {', '.join(ALL_TARGETS)}; tokens/s",
        [
            *("case", "PEFT", "PEFT, eager attention", "loraplex", "loraplex, first epoch"),
            *("loraplex / PEFT", "loraplex / better PEFT"),
        ],
        rows,
    )


if __name__ == "__main__":
    main()
