"""One batch whose rows go through no adapter, one adapter, another, and two linked ones.

    python examples/01_mixed_batch.py

Takes some 15 seconds on two CPU cores, and 20 more the first time, when the base model is converted.
"""

import argparse
from pathlib import Path

import torch

from loraplex import MultiLoraModel
from loraplex.models.text.prompts import encode_prompts, generate_texts

MOLECULE = "Molecule CN1CC1(C)CC(C)=O: is its HOMO-LUMO gap low, medium or high?"  # held out; the answer is low
CRYSTAL = "Material Br4Mo4S4: is its bulk modulus low, medium or high?"  # held out; the answer is low
ROWS = [  # a prompt, and the adapters that its row goes through
    ("What is the capital of France?", None),
    (MOLECULE, None),
    (MOLECULE, "quantum"),
    (CRYSTAL, "materials"),
    (CRYSTAL, "quantum:0.3+materials:0.7"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="or a folder, or a hub id")
    parser.add_argument("--adapters", type=Path, default=Path("examples/adapters"), help="folder of the two adapters")
    parser.add_argument("--dtype", default="bfloat16", help="or float32, whose answers are the same on any processor")
    options = parser.parse_args()

    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    for name in ("quantum", "materials"):
        model.load_adapter(name, options.adapters / name)
    prompts, choices = [prompt for prompt, _ in ROWS], [choice for _, choice in ROWS]

    # Text in, text out: tokenizing with the chat template, padding and decoding are done for you.
    batch = generate_texts(model, prompts, adapters=choices, max_new_tokens=24)
    for prompt, choice, text in zip(prompts, choices, batch.texts, strict=True):
        print(f"{choice or 'none (base model)'}\n  {prompt}\n  -> {text}\n")

    # Tensors in, tensors out: the base model's forward, with one more argument.
    inputs = encode_prompts(model.tokenizer, prompts)
    mixed = model(**inputs, adapters=choices).logits  # [rows, tokens, vocab]
    base = model(**inputs).logits
    for row, choice in enumerate(choices):
        same = "equal the base model's to the bit" if torch.equal(mixed[row], base[row]) else "differ"
        print(f"row {row}, {choice or 'none'}: its logits {same}")

    # Adapters come and go while the model runs; a request that runs finishes with what it started with.
    model.unload("materials")
    for state in model.adapters():
        print(f"still loaded: {state.name}, version {state.version}, {state.num_bytes:,} bytes, in tier {state.tier!r}")


if __name__ == "__main__":
    main()
