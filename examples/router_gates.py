"""A picture of a one-pass router's gates, token by token, where a conversation goes from one domain to another.

    python examples/router_gates.py --router examples/mixtures/distilled --output runs/gates.png
    python examples/router_gates.py --two-questions --output runs/two.png

Each column is a token, each row an expert; the colour is the mean of its gates over the LoRA layers. With
`--two-questions` both questions stand in one prompt and the answer is "low; yes": white lines mark where the second
question, the answer and its second half begin, and the mean gates of each part are printed.
"""

import argparse
from bisect import bisect_right
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mixture_table import DOMAINS, load_router
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.models.text.chat_template import render_chat
from loraplex.output_files import save_figure
from loraplex.routers.router import LinearRouter
from loraplex.routing.routing import use_routing
from loraplex.training.mixture.parameters import frozen_slots
from loraplex.training.mixture.routing import Experts
from loraplex.training.routers.routing import LayerGating, router_routing

CHAT = (
    ("user", "Molecule CN1CC1(C)CC(C)=O: is its HOMO-LUMO gap low, medium or high?"),
    ("assistant", "low"),
    ("user", "Peptide Q W G R R C C G W G P G R R Y C R R W C: is it antimicrobial, yes or no?"),
)


TWO_QUESTIONS = (("user", f"{CHAT[0][1]} {CHAT[2][1]}"), ("assistant", "low; yes"))
PARTS = ("second question:", "answer, first half:", "answer, second half:")
STARTS = ("Peptide Q", "low; yes", "yes<|im_end|>")  # of the second question, the answer, and its second half


@torch.no_grad()
def mean_gates(model: MultiLoraModel, name: str, ids: Tensor) -> Tensor:  # [1, tokens] -> [tokens, experts]
    """The router's gates of each token, in the mean over the LoRA layers."""
    mixture, found = model.mixtures.get(name), []
    assert isinstance(mixture.router, LinearRouter), "the folder has another kind of router"

    def listen(gating: LayerGating) -> None:
        found.append(gating.gates)

    experts = Experts(frozen_slots(model, mixture.experts), frozen=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    with use_routing(router_routing(experts, mixture.router, 1, ids.shape[1], nothing, listen)):
        model.base.base_model(input_ids=ids, use_cache=False)
    return torch.stack(found).mean(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--router", type=Path, default=Path("examples/mixtures/distilled"))
    parser.add_argument("--experts", type=Path, default=Path("examples/mixtures/science"))
    parser.add_argument("--output", type=Path, default=Path("runs/gates.png"))
    parser.add_argument("--two-questions", action="store_true", help="in one prompt, with the answer to both")
    options = parser.parse_args()
    chat = TWO_QUESTIONS if options.two_questions else CHAT
    model = MultiLoraModel.from_pretrained(options.model, dtype="bfloat16")
    load_router(model, "router", options.router, options.experts)
    messages = [{"role": role, "content": text} for role, text in chat]
    text = render_chat(model.tokenizer, messages, add_generation_prompt=chat[-1][0] == "user")
    encoded = model.tokenizer(text, return_tensors="pt", return_offsets_mapping=True, add_special_tokens=False)
    ids = encoded["input_ids"]
    gates = mean_gates(model, "router", ids)
    figure = Figure(figsize=(0.16 * len(gates) + 2, 3), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gates.t(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(DOMAINS)), DOMAINS)
    words = [model.tokenizer.decode([token]).replace("\n", "\\n").strip() or "_" for token in ids[0].tolist()]
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    figure.colorbar(image, label="mean gate")
    if options.two_questions:
        begins = [start for start, _ in encoded["offset_mapping"][0].tolist()]
        parts = [bisect_right(begins, text.rindex(start)) - 1 for start in STARTS]
        for part in parts:
            axes.axvline(part - 0.5, color="white")
        for name, first, last in zip(PARTS, parts, [*parts[1:], len(gates)], strict=True):
            shares = gates[first:last].mean(dim=0)
            print(name, ", ".join(f"{domain} {share:.2f}" for domain, share in zip(DOMAINS, shares, strict=True)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.output, dpi=150)


if __name__ == "__main__":
    main()
