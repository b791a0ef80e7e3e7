"""Small data sets in the place of those that the cookbook's recipes load by name, and a model's name that it knows.

`datasets` and `transformers` take a folder of the working directory for what a hub has under the same name.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# From the cookbook's table of models. Its turns are lines "User: ..." and "Assistant: ...", which any model reads.
MODEL = "meta-llama/Llama-3.2-1B"
RENDERER = "role_colon"
CAPITALS = {"Lorania": "Plexburg", "Batchia": "Rankton", "Gatia": "Slotville", "Mixtura": "Headford"}
NUMBERS = (3, 7, 5, 2, 9, 4, 8, 6)
NUM_COPIES = 8


def write_all(root: Path) -> None:
    """The data of the supervised loop, of the loop with rewards, and of DPO."""
    no_robots = [
        {"messages": [_turn("user", _question(land)), _turn("assistant", f"The capital of {land} is {city}.")]}
        for land, city in CAPITALS.items()
    ]
    gsm8k = [{"question": f"Write \\boxed{{{number}}}.", "answer": f"#### {number}"} for number in NUMBERS]
    hh_rlhf = [
        {"chosen": _dialogue(land, f"The capital is {city}."), "rejected": _dialogue(land, "I don't know.")}
        for land, city in CAPITALS.items()
    ]
    _write(root / "HuggingFaceH4/no_robots", {"train": NUM_COPIES * no_robots})
    _write(root / "openai/gsm8k", {"train": NUM_COPIES * gsm8k}, config="main")
    _write(root / "Anthropic/hh-rlhf", {"train": NUM_COPIES * hh_rlhf, "test": hh_rlhf[:2]})


def _question(land: str) -> str:
    return f"What is the capital of {land}?"


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _dialogue(land: str, answer: str) -> str:
    return f"\n\nHuman: {_question(land)}\n\nAssistant: {answer}"


def _write(folder: Path, splits: Mapping[str, Iterable[Mapping[str, Any]]], config: str = "default") -> None:
    folder.mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(f"  - split: {split}\n    path: {split}.jsonl\n")
    header = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{''.join(files)}---\n"
    (folder / "README.md").write_text(header)
