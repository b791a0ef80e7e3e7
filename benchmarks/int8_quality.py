"""How far do 8-bit weights take a model's predictions from those of float32?

    python benchmarks/int8_quality.py

The mean Kullback-Leibler divergence of the next token's distribution from float32's, and how often the likeliest
token is the same, on text of Python's language reference (pydoc_data.topics). Sides: bfloat16; our 8-bit weights
(bfloat16 beside them); and llama.cpp's Q8_0, emulated in float32: its weights (groups of 32, float16 scales), without
and with its activations, which it rounds to 8 bits in groups of 32 too.
"""

import argparse
import copy
import pydoc_data.topics
from collections.abc import Iterator
from functools import partial

import torch
from common import console, print_table, save
from torch import Tensor, nn

from loraplex.kernels.int8_weight import Int8Weight
from loraplex.kernels.native import native_available
from loraplex.models.checkpoints.loading import load_base_model, load_tokenizer

WINDOW = 512  # tokens that are read together
GROUP = 32  # of Q8_0


def windows(model: str, num_tokens: int) -> Iterator[Tensor]:
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = load_tokenizer(model)(text, return_tensors="pt", verbose=False).input_ids
    yield from ids[:, : num_tokens // WINDOW * WINDOW].split(WINDOW, dim=1)


def q8_0_weights(base: nn.Module) -> nn.Module:
    """A float32 model with the values that its linear weights have as Q8_0."""
    made = copy.deepcopy(base)
    made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone(), requires_grad=False)
    for module in made.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = Int8Weight.of(module.weight, GROUP).to_values(torch.float32)
    return made


def with_q8_activations(base: nn.Module) -> nn.Module:
    """The same, whose linear modules' inputs are rounded to 8 bits in groups."""
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
    return base


def rounded(x: Tensor) -> Tensor:
    grouped = x.unflatten(-1, (-1, GROUP))
    scales = (grouped.abs().amax(dim=-1, keepdim=True) / 127).half().float().clamp_min(1e-8)
    return ((grouped / scales).round() * scales).flatten(-2)


def log_probabilities(base: nn.Module, ids: Tensor) -> Tensor:  # [tokens, vocabulary]
    return base(input_ids=ids).logits[0].float().log_softmax(dim=-1)


def sides(model: str) -> dict[str, nn.Module]:
    exact = load_base_model(model, dtype="float32")[0]
    q8_0 = q8_0_weights(exact)
    return {
        "float32": exact,
        "bfloat16": load_base_model(model, dtype="bfloat16")[0],
        "int8": load_base_model(model, dtype="bfloat16", weights="int8")[0],
        "q8_0_weights": q8_0,
        "q8_0_weights_and_activations": with_q8_activations(copy.deepcopy(q8_0)),
    }


def compare(model: str, num_tokens: int) -> dict[str, dict[str, float]]:
    runs = {side: partial(log_probabilities, base) for side, base in sides(model).items()}
    exact = runs.pop("float32")
    totals = {side: torch.zeros(2, dtype=torch.float64) for side in runs}
    count = 0
    with torch.inference_mode():
        for ids in windows(model, num_tokens):
            expected = exact(ids)
            count += len(expected)
            for side, run in runs.items():
                found = run(ids)
                divergence = (expected.exp() * (expected - found)).sum(dim=-1)
                is_same = expected.argmax(dim=-1) == found.argmax(dim=-1)
                totals[side] += torch.stack([divergence.double().sum(), is_same.double().sum()])
            console.print(count, {side: f"{total[0] / count:.2e}" for side, total in totals.items()})
    return {
        side: {"divergence": float(d) / count, "same_token": float(same) / count} for side, (d, same) in totals.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if not native_available():
        raise SystemExit("there is no compiled kernel")
    results = compare(options.model, options.tokens)
    rows = [[side, f"{found['divergence']:.2e}", f"{found['same_token']:.1%}"] for side, found in results.items()]
    print_table("Divergence from float32", ["weights", "KL, nats", "same likeliest token"], rows)
    if not options.no_save:
        save("int8_quality", vars(options), results)


if __name__ == "__main__":
    main()
