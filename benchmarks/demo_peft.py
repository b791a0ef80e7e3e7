"""The demo's batch through PEFT's mixed batch, beside loraplex, alternating in one process.

    python benchmarks/demo_peft.py

PEFT has no linked rows in a mixed batch, so it gets the link as one more adapter (add_weighted_adapter). It has no rows
of an X-LoRA mixture in one either, and no residual adapters: their rows are left out on both sides.
"""

import time
from pathlib import Path

import torch
from common import alternate, medians, print_table
from peft import PeftModel

from loraplex import MultiLoraModel
from loraplex.cli.demo import DEMO_MODEL, TIMED_TOKENS, demo_adapters, demo_rows
from loraplex.models.loading import load_base_model
from loraplex.models.prompts import encode_prompts
from loraplex.routing.adapter_spec import parse_adapter_spec


def main(dtype: str = "bfloat16", rounds: int = 3) -> None:
    folders = demo_adapters(Path("examples/adapters"))
    rows = [
        row
        for row in demo_rows(Path("data"), list(folders))
        if all(name in folders for name, _ in parse_adapter_spec(row.adapters))
    ]
    ours = MultiLoraModel.from_pretrained(DEMO_MODEL, dtype=dtype)
    peft_model = None
    for name, folder in folders.items():
        ours.load_adapter(name, folder)
        if peft_model is None:
            base, _ = load_base_model(DEMO_MODEL, dtype=dtype)
            peft_model = PeftModel.from_pretrained(base, str(folder), name)
        else:
            peft_model.load_adapter(str(folder), name)
    assert peft_model is not None, "demo_adapters returned none"
    peft_names = []
    for number, row in enumerate(rows):
        link = parse_adapter_spec(row.adapters)
        if len(link) > 1:
            names, weights = zip(*link, strict=True)
            peft_model.add_weighted_adapter(list(names), list(weights), f"link{number}", combination_type="cat")
        peft_names.append("__base__" if not link else link[0][0] if len(link) == 1 else f"link{number}")
    peft_model.eval()
    inputs = encode_prompts(ours.tokenizer, [row.prompt for row in rows])
    options = {"do_sample": False, "max_new_tokens": TIMED_TOKENS, "min_new_tokens": TIMED_TOKENS}
    tokens = {}

    def timed(name, run) -> float:
        start = time.perf_counter()
        tokens[name] = run()
        return len(rows) * TIMED_TOKENS / (time.perf_counter() - start)

    with torch.no_grad():
        speeds = medians(
            alternate(
                {
                    "PEFT, mixed batch": lambda: timed(
                        "peft", lambda: peft_model.generate(**inputs, adapter_names=peft_names, **options)
                    ),
                    "loraplex": lambda: timed(
                        "ours", lambda: ours.generate(**inputs, adapters=[row.adapters for row in rows], **options)
                    ),
                    "loraplex, no adapters": lambda: timed("base", lambda: ours.generate(**inputs, **options)),
                },
                rounds,
            )
        )
    peft_speed = speeds["PEFT, mixed batch"]
    print_table(
        f"The demo's batch: {len(rows)} rows x {TIMED_TOKENS} tokens, {DEMO_MODEL}, {dtype}",
        ["", "tokens/s", "against PEFT"],
        [[name, f"{speed:.0f}", f"{speed / peft_speed:.2f}x"] for name, speed in speeds.items()],
    )


if __name__ == "__main__":
    main()
