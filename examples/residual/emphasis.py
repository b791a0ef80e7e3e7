"""Emphasise the right passage of a prompt: how often is the answer right, before and after?

    python examples/residual/emphasis.py --cases 100

Each prompt has several passages about people with similar names, of which one holds the answer. A retriever knows
which passage it is looking for; here the case itself does. Nothing is trained: attention to the passage is multiplied
before the softmax. Every case runs with the passage as it is and with each strength, as rows of one batch.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from loraplex import MultiLoraModel
from loraplex.models.text import as_chat, encode_prompts
from loraplex.residual.linked import AttentionRequest
from loraplex.residual.spans import spans_of_text
from loraplex.residual.steering import Steering

FIRST = ("Ada", "Bela", "Carla", "Doris", "Edith", "Frieda", "Greta", "Hanna", "Irma", "Jana")
LAST = ("Brown", "Green", "White", "Black", "Gray", "Rose", "Stone", "Wood", "Hill", "Field")
PLACES = ("library", "harbour", "museum", "station", "hospital", "theatre", "school", "bakery", "bank", "airport")


class Case(NamedTuple):
    """A question over passages, the passage that answers it, and the answer."""

    prompt: str
    passage: str
    answer: str


def make_case(draw: random.Random, num_passages: int) -> Case:
    first = draw.sample(FIRST, 3)
    last = draw.sample(LAST, 3)
    people = draw.sample([f"{a} {b}" for a in first for b in last], num_passages)  # names that share their parts
    places = draw.sample(PLACES, num_passages)
    codes = draw.sample(range(1000, 10000), num_passages)
    passages = [
        f"{who} works at the {where}; the code is {code}."
        for who, where, code in zip(people, places, codes, strict=True)
    ]
    wanted = draw.randrange(num_passages)
    question = f"What is the code of {people[wanted]}? Answer with the number."
    return Case(" ".join(passages) + " " + question, passages[wanted], str(codes[wanted]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--strengths", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=None, help="JSON file for the result")
    options = parser.parse_args()

    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    draw = random.Random(options.seed)
    strengths = [1.0, *options.strengths]
    right = dict.fromkeys(strengths, 0)
    for number in track(range(options.cases), "cases"):
        case = make_case(draw, options.passages)
        spans = spans_of_text(model.tokenizer, as_chat(model.tokenizer, case.prompt), case.passage)
        encoded = encode_prompts(model.tokenizer, [case.prompt] * len(strengths))
        request = AttentionRequest(steering=[Steering(spans=spans, strength=strength) for strength in strengths])
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        new = model.generate(ids, mask, attention=request, max_new_tokens=16, do_sample=False)[:, ids.shape[1] :]
        texts = [model.tokenizer.decode(row, skip_special_tokens=True) for row in new]
        for strength, text in zip(strengths, texts, strict=True):
            right[strength] += case.answer in text
        if number == 0:
            Console().print(
                case.prompt, *(f"strength {s:g}: {t}" for s, t in zip(strengths, texts, strict=True)), sep="\n"
            )
    for strength, count in right.items():
        name = "as it is" if strength == 1 else f"strength {strength:g}"
        Console().print(f"{name}: {count} of {options.cases} right")
    if options.write is not None:
        accuracy = {f"{strength:g}": count / options.cases for strength, count in right.items()}
        content = {"cases": options.cases, "passages": options.passages, "seed": options.seed, "accuracy": accuracy}
        options.write.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
