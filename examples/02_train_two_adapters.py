"""Train two adapters in the same batches, and use them at once.

    python examples/02_train_two_adapters.py              # 4 steps: shows the calls, learns next to nothing
    python examples/02_train_two_adapters.py --steps 200  # learns

The command line does the same: see docs/training.md.
"""

import argparse
from pathlib import Path

from loraplex import LoraConfig, MultiLoraModel
from loraplex.models.text.prompts import generate_texts
from loraplex.training import AdapterJob, EvaluationConfig, OptimizerConfig, StepsConfig, TrainConfig, train_adapters

DATA = Path(__file__).parent.parent / "data"
DOMAINS = {"quantum": 8, "protein": 16}  # and the rank of each adapter: jobs need not be alike


def make_job(domain: str, rank: int, steps: int) -> AdapterJob:
    """A job for one domain of data/."""
    return AdapterJob(
        name=domain,
        data=DATA / domain / "train.jsonl",
        eval_data=DATA / domain / "valid.jsonl",
        lora=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
        steps=StepsConfig(max_steps=steps, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(eval_records=16),  # of 400: this example is in a hurry
        seed=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="or a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/two_adapters"), help="replaced at every run")
    options = parser.parse_args()

    model = MultiLoraModel.from_pretrained(options.model, dtype="float32")
    results = train_adapters(
        model,
        model.tokenizer,
        jobs=[make_job(domain, rank, options.steps) for domain, rank in DOMAINS.items()],
        config=TrainConfig(output=options.output, resume=False, plots=False),
    )
    for result in results:
        print(
            f"{result.name}: loss {result.train_losses[0]:.2f} -> {result.train_losses[-1]:.2f} in {result.num_steps} "
            f"steps, held out {result.eval_losses[-1]:.2f}; written to {result.folder}"
        )

    # What was trained is a folder in PEFT's format, and loads like any other.
    for result in results:
        model.load_adapter(result.name, result.folder)
    question = "Molecule CN1CC1(C)CC(C)=O: is its HOMO-LUMO gap low, medium or high?"
    choices = [None, "quantum", "protein", "quantum+protein"]
    batch = generate_texts(model, [question] * len(choices), adapters=choices, max_new_tokens=16)
    for choice, text in zip(choices, batch.texts, strict=True):
        print(f"{choice or 'none (base model)'}: {text}")


if __name__ == "__main__":
    main()
