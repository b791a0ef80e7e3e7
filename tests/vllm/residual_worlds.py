"""Residuals of every kind as folders beside the adapters of a tiny Llama, and loraplex's own model with all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import IA3Config, get_peft_model
from transformers import AutoModelForCausalLM

from loraplex import MultiLoraModel
from loraplex.residual import (
    AttentionRequest,
    Positions,
    Steering,
    parse_positions,
    write_control_vector,
    write_residual,
)
from tests.residual.tiny_interventions import random_block_vector, random_reft
from tests.residual.tiny_residuals import random_linked, random_vector
from tests.vllm.worlds import TOP, Answer, Difference

VECTORS = {
    "block": ("block", "all"),
    "mlp": ("mlp", "all"),
    "after": ("block", "generated"),
    "first": ("attention", "f3+l2"),
    "asked": ("mlp", "prompt"),
}


def add_residuals(world: Any, *, has_mlp: bool = True) -> MultiLoraModel:
    """Write every kind into the folder that the plugin serves; and loraplex's own model with all of them."""
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32, attn_implementation="eager")
    model = MultiLoraModel(base.eval())
    for name, folder in world.adapters.items():
        model.load_adapter(name, folder)
    layers = model.registry.linked.layers
    made = {
        name: random_block_vector(model.base, seed, site, parse_positions(positions))
        for seed, (name, (site, positions)) in enumerate(VECTORS.items())
        if has_mlp or site != "mlp"
    }
    made["late"] = random_block_vector(model.base, 8, "block", at=(1,))
    made["reft"] = random_reft(model.base, 9, parse_positions("f3+l2"))
    if has_mlp:
        made["reft_mlp"] = random_reft(model.base, 10, Positions(), site="mlp", subtracts=False)
    made["heard"] = random_vector(layers, 11)  # on attention, all tokens
    made["linked"] = random_linked(layers, 12)
    made["linked_late"] = random_linked(layers, 13, r=5, at=(1,))
    for name, residual in made.items():
        write_residual(residual, world.named / name)
        model.load_residual(name, world.named / name)
    if has_mlp:
        write_ia3(world)
        model.load_adapter("ia3", world.named / "ia3")
    write_control_vector(made["late"], world.named / "calm.gguf", model_type="llama")
    model.load_residual("calm", world.named / "calm.gguf")
    return model


def write_ia3(world: Any) -> None:
    """PEFT's IA3 with random gates, on parts of packed layers, on a whole output, and on what a module reads."""
    torch.manual_seed(14)
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    targets = [name for name in ("k_proj", "v_proj", "o_proj", "qkv_proj", "down_proj") if _has(base, name)]
    config = IA3Config(target_modules=targets, feedforward_modules=["down_proj"], init_ia3_weights=False)
    get_peft_model(base, config).save_pretrained(world.named / "ia3")


def _has(base: torch.nn.Module, name: str) -> bool:
    return any(path.endswith(f".{name}") for path, _ in base.named_modules())


@torch.no_grad()
def compared(
    model: MultiLoraModel,
    rows: Sequence[tuple[str | None, Sequence[int]]],
    answers: Any,
    steered: Sequence[Sequence[Steering]] | None = None,  # by row
) -> Difference:
    """The answers against what loraplex's own model says to the same tokens, one row at a time."""
    found = Difference()
    for (choice, prompt), answer, steering in zip(rows, answers, steered or [()] * len(rows), strict=True):
        ids = torch.tensor([[*prompt, *answer.tokens]])
        request = AttentionRequest(prompt_lengths=[len(prompt)], steering=[steering])
        logits = model(ids, adapters=[choice], attention=request, use_cache=False).logits[0, len(prompt) - 1 : -1]
        best = torch.log_softmax(logits.float(), dim=-1).topk(TOP)
        tops = [dict(zip(i, p, strict=True)) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        found.add(answer, Answer(best.indices[:, 0].tolist(), tops))
    return found
