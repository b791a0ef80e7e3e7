"""The cookbook's recipes, unmodified, in processes of their own: the supervised loop, the loop with rewards, DPO."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tinker

from tests.clients.tinker.recipe_data import MODEL, RENDERER, write_all

TIMEOUT_S = 900
pytestmark = pytest.mark.timeout(TIMEOUT_S + 300)


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes' working directory: their data, and the model's tokenizer under its name."""
    root = tmp_path_factory.mktemp("cookbook")
    write_all(root)
    with tinker.ServiceClient() as client:
        run = client.create_lora_training_client(base_model=MODEL, rank=1).result()
        run.get_tokenizer().save_pretrained(root / MODEL)
    return root


def run_recipe(recipe: str, folder: Path, **settings: object) -> list[Mapping[str, float]]:
    """What a recipe has logged at each step."""
    log = folder / recipe.rpartition(".")[2]
    settings = {"model_name": MODEL, "log_path": log, **settings}
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"tinker_cookbook.recipes.{recipe}", *(f"{k}={v}" for k, v in settings.items())],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


def test_the_supervised_loop_learns(folder: Path) -> None:
    steps = run_recipe("sl_loop", folder, batch_size=4, max_steps=6, learning_rate=1e-3)
    losses = [step["train_mean_nll"] for step in steps]
    assert len(losses) == 6
    assert losses[-1] < 0.4 * losses[0], losses


def test_the_loop_with_rewards_raises_them(folder: Path) -> None:
    """The answer is in the question; what is rewarded is to write it in a box, and in few tokens."""
    steps = run_recipe(
        "rl_loop",
        folder,
        batch_size=4,
        group_size=8,
        max_steps=8,
        max_tokens=12,
        loss_fn="importance_sampling",
        learning_rate=1e-3,
    )
    rewards = [step["reward/total"] for step in steps]
    assert len(rewards) == 8
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.2, rewards


def test_dpo_learns_the_preference(folder: Path) -> None:
    steps = run_recipe(
        "preference.dpo.train",
        folder,
        renderer_name=RENDERER,
        batch_size=2,
        max_steps=5,
        max_length=256,
        learning_rate=1e-3,
        behavior_if_log_dir_exists="delete",
    )
    assert steps[0]["dpo_loss"] == pytest.approx(0.6931, abs=1e-3)  # a policy that is the reference still
    assert steps[-1]["dpo_loss"] < 0.1
    assert steps[-1]["margin"] > 3
