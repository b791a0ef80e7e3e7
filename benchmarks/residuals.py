"""What vectors, linked residuals and ReFT in some rows cost the engine's whole batch, decoding.

    python benchmarks/residuals.py
    python benchmarks/residuals.py --shape 1.1b --tokens 24 --rounds 3 --clock cpu
    python benchmarks/residuals.py --shape 1.1b --layers 3 --tokens 4 --rounds 1 --name trial  # that it runs

One batch of 8 requests generates 48 tokens each in the engine, in turn: nothing asked for; each row with a control
vector of its own on all blocks; 4 rows through a chain of 2 linked residuals (rank 8, 8 layers); each row with ReFT
(rank 4, all blocks, first and last 7 tokens of its prompt); each row with attention steered in all layers. With
--shape 1.1b the model is one of TinyLlama's shape and random weights. Figures are new tokens a second of the whole
batch, prefill included, medians over the rounds; ratios are taken within a round, and then their median.
A round that would not be done after --seconds isn't begun.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from common import alternate, medians, print_table, save
from linked import RESIDUAL_LAYERS, random_residual
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.residual import Intervention, ReftResidual, Steering, SteeringVector, parse_positions

ROWS = 8
PROMPT_TOKENS = 25


def load(shape: str, dtype: str, num_layers: int) -> MultiLoraModel:
    """SmolLM2, or a model of TinyLlama's shape, with so many layers, and random weights."""
    if shape == "135m":
        return MultiLoraModel.from_pretrained("smollm2-135m", dtype=dtype)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return MultiLoraModel(base.eval().requires_grad_(False))


def random_vector(model: MultiLoraModel, seed: int) -> SteeringVector:
    """On the outputs of all blocks but the first, as control vectors are, weak enough to leave the text sensible."""
    draw = torch.Generator().manual_seed(seed)
    sites = model.registry.linked.sites
    vectors = {n: torch.randn(sites.hidden_size, generator=draw) * 0.01 for n in range(1, sites.num_blocks)}
    return SteeringVector(vectors=vectors, base=None, site="block")


def random_reft(model: MultiLoraModel, seed: int) -> ReftResidual:
    """Rank 4 on all blocks, at the first and last 7 tokens of the prompt."""
    draw = torch.Generator().manual_seed(seed)
    sites, positions = model.registry.linked.sites, parse_positions("f7+l7")
    size = sites.hidden_size

    def one(block: int) -> Intervention:
        rotation = torch.linalg.qr(torch.randn(size, 4, generator=draw))[0].t().contiguous()
        return Intervention(block=block, positions=positions, r=rotation, w=rotation.clone(), b=torch.zeros(4))

    return ReftResidual(interventions=tuple(map(one, range(sites.num_blocks))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", choices=["135m", "1.1b"], default="135m")
    parser.add_argument("--layers", type=int, default=22, help="of the 1.1b shape")
    parser.add_argument("--seconds", type=float, default=240.0, help="of all rounds")
    parser.add_argument("--name", default=None, help="of the result file; default: by the shape")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of one thread")
    options = parser.parse_args()

    clock = time.perf_counter
    if options.clock == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    model = load(options.shape, options.dtype, options.layers)
    linked_layers = tuple(n for n in RESIDUAL_LAYERS if n < model.registry.linked.sites.num_blocks) or (0, 1)
    for row in range(ROWS):
        model.load_residual(f"vector{row}", random_vector(model, row))
        model.load_residual(f"reft{row}", random_reft(model, 20 + row))
    model.load_residual("a", random_residual(model, 1, linked_layers))
    model.load_residual("b", random_residual(model, 2, linked_layers))
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 30000, (ROWS, PROMPT_TOKENS), generator=draw).tolist()
    sampling = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
    with Engine(model, EngineConfig(prefix_cache=False)) as engine:

        def timed(adapters: Sequence[str | None], *steering: Steering) -> Callable[[], float]:
            asked = [
                Request(prompt, adapters=one, sampling=sampling, steering=steering)
                for prompt, one in zip(prompts, adapters, strict=True)
            ]

            def run() -> float:
                start = clock()
                engine.generate(asked)
                return ROWS * options.tokens / (clock() - start)

            return run

        kinds = {
            "nothing": timed([None] * ROWS),
            "8 rows with 8 control vectors": timed([f"vector{row}" for row in range(ROWS)]),
            "8 rows with 8 ReFTs on prompts": timed([f"reft{row}" for row in range(ROWS)]),
            "4 rows through 2 linked residuals": timed(["a+b"] * 4 + [None] * 4),
            "8 rows steered by a factor": timed([None] * ROWS, Steering(spans=((3, 9),), strength=3.0)),
            "8 rows steered to a share": timed([None] * ROWS, Steering(spans=((3, 9),), share=0.3)),
        }
        figures = alternate(kinds, options.rounds, seconds=options.seconds)
    speeds = medians(figures)
    ratios = {
        name: statistics.median(own / none for own, none in zip(values, figures["nothing"], strict=True))
        for name, values in figures.items()
    }
    print_table(
        f"{ROWS} rows x {options.tokens} tokens in the engine, {options.shape}, {options.dtype}",
        ["asked for", "tokens/s", "of nothing"],
        [[name, f"{speeds[name]:.1f}", f"{ratios[name]:.2f}"] for name in speeds],
    )
    workload = {
        "rows": ROWS,
        "new_tokens": options.tokens,
        "dtype": options.dtype,
        "rounds": len(figures["nothing"]),
        "clock": options.clock,
        "linked_layers": linked_layers,
        "shape": options.shape,
    }
    save(
        options.name or ("residuals" if options.shape == "135m" else f"residuals_{options.shape}"),
        workload,
        {"tokens_per_s": speeds, "ratio": ratios, "all_rounds": figures},
    )


if __name__ == "__main__":
    main()
