"""Why a mixture may lose to its best expert: what the tokens before the question cost.

    python examples/mixture_prefix.py --mixture examples/mixtures/science

All prompts begin with the same chat template, in which no head can know what will be asked; an expert alone was active
there in training, and is when it is used alone. So three heads that need no training are compared with the expert: one
that chooses the right expert everywhere ("everywhere": the expert itself), one that does so from the question's first
token on and averages before it ("uniform before"), and one that leaves the base model alone before it ("base before").
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from loraplex import MultiLoraModel
from loraplex.models.text.prompts import encode_prompts
from loraplex.training.adapters.evaluation import Question, exact_matches, read_questions

MIXTURE = "science"


class OracleHead(nn.Module):
    """Scalings by position: one expert from the question on, something else before; padding is on the left."""

    def __init__(self, head: nn.Module, before: float | None, num_before: int) -> None:
        super().__init__()
        self.shape = (head.num_layers, head.num_experts)
        self.expert, self.before, self.num_before = 0, before, num_before
        self.mask: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:  # [rows, copies, tokens, hidden]
        scalings = torch.zeros(*hidden.shape[:-1], *self.shape)
        scalings[..., self.expert] = 1.0
        if self.before is not None:
            for row, start in enumerate(self.starts):
                scalings[row, :, : start + self.num_before] = self.before
        return scalings

    @property
    def starts(self) -> list[int]:
        """Where each row's own tokens begin."""
        assert self.mask is not None, "the mask of the batch was not set"
        return [int(row.argmax()) for row in self.mask]


def shared_prefix(model: MultiLoraModel) -> int:
    """How many tokens two prompts have in common at their start."""
    ids = [encode_prompts(model.tokenizer, [text])["input_ids"][0].tolist() for text in ("Molecule", "protein")]
    return next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--mixture", type=Path, default=Path("examples/mixtures/science"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--domains", nargs="+", default=["materials", "quantum"])
    parser.add_argument("--limit", type=int, default=80)
    options = parser.parse_args()
    model = MultiLoraModel.from_pretrained(options.model, dtype="bfloat16")
    model.load_mixture(MIXTURE, options.mixture)
    mixture = model.mixtures.get(MIXTURE)
    names = [expert.removeprefix(f"{MIXTURE}/") for expert in mixture.experts]
    num_before = shared_prefix(model)
    heads = {"everywhere": None, "uniform before": 1 / len(names), "base before": 0.0}
    table = Table(title=f"exact match; {num_before} tokens before the question", title_justify="left")
    for column in ("domain", "questions", *heads):
        table.add_column(column)
    trained = mixture.head
    for domain in options.domains:
        questions = read_questions(options.data / domain / "test.jsonl", options.limit)
        cells = []
        for before in heads.values():
            head = OracleHead(trained, before, num_before)
            head.expert = names.index(domain)
            cells.append(f"{score(model, head, questions):.3f}")
        table.add_row(domain, str(len(questions)), *cells)
    Console().print(table)


class MaskedModel:
    """The model, telling the head each batch's mask."""

    def __init__(self, model: MultiLoraModel, head: OracleHead) -> None:
        self.tokenizer, self.base = model.tokenizer, model.base
        self._model, self._head = model, head

    def __call__(self, input_ids: Tensor, mask: Tensor, **options: object) -> object:
        self._head.mask = mask
        return self._model(input_ids, mask, **options)


def score(model: MultiLoraModel, head: OracleHead, questions: list[Question]) -> float:
    """The share of right answers with another head in the mixture's place."""
    object.__setattr__(model.mixtures.get(MIXTURE), "head", head)
    return exact_matches(MaskedModel(model, head), questions, [MIXTURE])[0]


if __name__ == "__main__":
    main()
