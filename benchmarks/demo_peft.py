"""The demo's batch through PEFT's mixed batch, beside loraplex, alternating in one process.

    python benchmarks/demo_peft.py

PEFT has no linked rows in a mixed batch, so it gets the link as one more adapter (add_weighted_adapter). It has no rows
of an X-LoRA mixture in one either, and no residual adapters: their rows are left out on both sides.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import alternate, medians, print_table
from rich.console import Console

from loraplex import MultiLoraModel
from loraplex.cli.demo import DEMO_MODEL, NEXT, TIMED_TOKENS, DemoRow, demo_adapters, demo_rows, step
from loraplex.cli.errors import quiet_libraries
from loraplex.models.checkpoints.loading import load_base_model
from loraplex.routing.adapter_spec import parse_adapter_spec

if TYPE_CHECKING:
    from peft import PeftModel


def load(
    rows: list[DemoRow], folders: dict[str, Path], dtype: str, tell: Callable[[str], None]
) -> "tuple[MultiLoraModel, PeftModel, list[str]]":
    """Both models with all adapters, and the name in PEFT of each row's."""
    from peft import PeftModel  # once libraries are quiet

    ours, peft_model = MultiLoraModel.from_pretrained(DEMO_MODEL, dtype=dtype), None
    for name, folder in folders.items():
        tell(f"loading adapter {name} into both ...")
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
    return ours, peft_model.eval(), peft_names


def main(dtype: str = "bfloat16", rounds: int = 2) -> None:
    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is about to rename
    console = Console(highlight=False)
    folders = demo_adapters(Path("examples/adapters"))
    rows = [
        row
        for row in demo_rows(Path("data"), list(folders))
        if all(name in folders for name, _ in parse_adapter_spec(row.adapters))
    ]
    with step(console, f"{len(folders)} adapters are loaded into PEFT and into loraplex") as status:
        ours, peft_model, peft_names = load(rows, folders, dtype, status.update)
    inputs = ours.encode_chat([row.prompt for row in rows])
    options = {"do_sample": False, "max_new_tokens": TIMED_TOKENS, "min_new_tokens": TIMED_TOKENS}

    def timed(name: str, run: Callable[[], object]) -> float:
        status.update(f"{len(rows)} rows x {TIMED_TOKENS} tokens, {rounds} rounds and a warm-up: {name} ...")
        start = time.perf_counter()
        run()
        return len(rows) * TIMED_TOKENS / (time.perf_counter() - start)

    sides = {
        "PEFT, mixed batch": lambda: peft_model.generate(**inputs, adapter_names=peft_names, **options),
        "loraplex": lambda: ours.generate(**inputs, adapters=[row.adapters for row in rows], **options),
        "loraplex, no adapters": lambda: ours.generate(**inputs, **options),
    }
    with (
        step(console, f"{len(rows)} rows x {TIMED_TOKENS} tokens run through both, in turns") as status,
        torch.no_grad(),
    ):
        speeds = medians(alternate({name: partial(timed, name, run) for name, run in sides.items()}, rounds))
    peft_speed = speeds["PEFT, mixed batch"]
    print_table(
        f"The demo's rows that PEFT can run in one batch: {len(rows)} of them, {DEMO_MODEL}, {dtype}",
        ["", "tokens/s", "against PEFT"],
        [[name, f"{speed:.0f}", f"{speed / peft_speed:.2f}x"] for name, speed in speeds.items()],
    )
    console.print(NEXT, soft_wrap=True)


if __name__ == "__main__":
    main()
