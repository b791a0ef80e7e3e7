"""What residuals, captures and steerings of some rows cost the whole batch.

    python benchmarks/linked.py

One batch of 8 rows generates 48 tokens each, in turn: nothing asked for; 1 row captures 2 layers; 4 rows go through a
link of 2 residuals (rank 8, 8 layers); 1 row is steered in all layers. Figures are new tokens a second of the whole
batch, prefill included, medians over the rounds; ratios are taken within a round, and then their median.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import alternate, medians, print_table, save
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.models.text.prompts import encode_prompts
from loraplex.residual import AttentionRequest, CaptureRequest, LinkedLayer, LinkedResidual, ResidualConfig, Steering

ROWS = 8
RESIDUAL_LAYERS = tuple(range(6, 22, 2))
CAPTURED_LAYERS = (10, 20)


def random_residual(model: MultiLoraModel, seed: int, at: tuple[int, ...] = RESIDUAL_LAYERS) -> LinkedResidual:
    """Rank 8 on eight layers, weak enough to leave the text sensible."""
    identity = model.registry.linked.layers.identity
    draw = torch.Generator().manual_seed(seed)

    def normal(columns: int, std: float) -> Tensor:
        return torch.randn(8, columns, generator=draw) * std

    layers = {
        layer: LinkedLayer(
            a=normal(identity.hidden_size, identity.hidden_size**-0.5),
            b=normal(identity.hidden_size, 0.01),
            head_logits=normal(identity.num_heads[layer], 1.0),
        )
        for layer in at
    }
    return LinkedResidual(config=ResidualConfig(r=8, layers=at), layers=layers, base=identity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    model = MultiLoraModel.from_pretrained("smollm2-135m", dtype=options.dtype)
    prompts = [f"Tell me in a few words what the number {row} is good for, and why." for row in range(ROWS)]
    encoded = encode_prompts(model.tokenizer, prompts)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]

    def timed(adapters: list[str | None], request: Callable[[], AttentionRequest | None]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            model.generate(
                *(ids, mask),
                adapters=adapters,
                attention=request(),
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                do_sample=False,
            )
            return ROWS * options.tokens / (time.perf_counter() - start)

        return run

    none: list[str | None] = [None] * ROWS
    untouched = timed(none, lambda: None)()  # warms up, before anything is attached
    untouched = max(untouched, timed(none, lambda: None)())
    model.load_residual("a", random_residual(model, 1))
    model.load_residual("b", random_residual(model, 2))
    capture = [CaptureRequest(layers=CAPTURED_LAYERS), *[None] * (ROWS - 1)]
    steering = [Steering(spans=((0, 8),), strength=2.0), *[None] * (ROWS - 1)]
    figures = alternate(
        {
            "nothing": timed(none, lambda: None),
            "1 row captures 2 layers": timed(none, lambda: AttentionRequest(capture=capture)),
            "4 rows through 2 linked residuals": timed(["a+b"] * 4 + [None] * 4, lambda: None),
            "1 row is steered in all layers": timed(none, lambda: AttentionRequest(steering=steering)),
        },
        options.rounds,
    )
    speeds = medians(figures)
    ratios = {
        name: statistics.median(own / none for own, none in zip(values, figures["nothing"], strict=True))
        for name, values in figures.items()
    }
    print_table(
        f"{ROWS} rows x {options.tokens} tokens, {options.dtype}; nothing attached: {untouched:.0f} tokens/s",
        ["asked for", "tokens/s", "of nothing"],
        [[name, f"{speeds[name]:.1f}", f"{ratios[name]:.2f}"] for name in speeds],
    )
    workload = {
        "rows": ROWS,
        "new_tokens": options.tokens,
        "prompt_tokens": int(ids.shape[1]),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "residual_layers": RESIDUAL_LAYERS,
        "captured_layers": CAPTURED_LAYERS,
    }
    save("linked", workload, {"tokens_per_s": speeds, "ratio": ratios, "all_rounds": figures, "untouched": untouched})


if __name__ == "__main__":
    main()
