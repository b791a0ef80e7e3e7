"""A picture of a one-pass router's gates, token by token, where a conversation goes from one domain to another.

    python examples/router_gates.py --router examples/mixtures/distilled --output runs/gates.png

Each column is a token, each row an expert; the colour is the mean of its gates over the LoRA layers.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mixture_table import DOMAINS, load_router
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.output_files import save_figure
from loraplex.routers.router import LinearRouter
from loraplex.routing.routing import use_routing
from loraplex.training.mixture.parameters import frozen_slots
from loraplex.training.mixture.routing import Experts
from loraplex.training.routers.routing import LayerGating, RouterTrainingRouting

CHAT = (
    ("user", "Molecule CN1CC1(C)CC(C)=O: is its HOMO-LUMO gap low, medium or high?"),
    ("assistant", "low"),
    ("user", "Peptide Q W G R R C C G W G P G R R Y C R R W C: is it antimicrobial, yes or no?"),
)


@torch.no_grad()
def mean_gates(model: MultiLoraModel, name: str, ids: Tensor) -> Tensor:  # [1, tokens] -> [tokens, experts]
    """The router's gates of each token, in the mean over the LoRA layers."""
    mixture, found = model.mixtures.get(name), []
    assert isinstance(mixture.router, LinearRouter), "the folder has another kind of router"

    def listen(gating: LayerGating) -> None:
        found.append(gating.gates)

    experts = Experts(frozen_slots(model, mixture.experts), frozen=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    with use_routing(RouterTrainingRouting(experts, mixture.router, 1, ids.shape[1], nothing, listen)):
        model.base.base_model(input_ids=ids, use_cache=False)
    return torch.stack(found).mean(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--router", type=Path, default=Path("examples/mixtures/distilled"))
    parser.add_argument("--experts", type=Path, default=Path("examples/mixtures/science"))
    parser.add_argument("--output", type=Path, default=Path("runs/gates.png"))
    options = parser.parse_args()
    model = MultiLoraModel.from_pretrained(options.model, dtype="bfloat16")
    load_router(model, "router", options.router, options.experts)
    messages = [{"role": role, "content": text} for role, text in CHAT]
    ids = model.encode_chat([messages])["input_ids"]
    gates = mean_gates(model, "router", ids)
    figure = Figure(figsize=(0.16 * len(gates) + 2, 3), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gates.t(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(DOMAINS)), DOMAINS)
    words = [model.tokenizer.decode([token]).replace("\n", "\\n").strip() or "_" for token in ids[0].tolist()]
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    figure.colorbar(image, label="mean gate")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.output, dpi=150)


if __name__ == "__main__":
    main()
