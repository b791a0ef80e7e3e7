"""Every benchmark, one after the other: `make bench`. Each writes its figures to benchmarks/results/.

python benchmarks/run_all.py            # all, about two hours on two cores
python benchmarks/run_all.py kernel_choice memory engine_decode
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "kernel_choice",
    "mixed_batch",
    "memory",
    "zipf",
    "training",
    "training_service",
    "moe_experts",
    "linked",
    "residuals",
    "adapter_kinds",
)
ENGINE = ("decode", "prefix", "load", "churn")  # commands of `loraplex bench engine`
NAMES = (*SCRIPTS, *(f"engine_{name}" for name in ENGINE))


def command(name: str) -> list[str]:
    """What measures `name`."""
    if name in SCRIPTS:
        return [sys.executable, str(HERE / f"{name}.py")]
    loraplex = [sys.executable, "-c", "from loraplex.cli.app import app; app()"]
    output = HERE / "results" / f"{name}.json"
    return [*loraplex, "bench", "engine", name.removeprefix("engine_"), "--full", "--output", str(output)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help=f"default: {' '.join(NAMES)}")
    failed = []
    for name in parser.parse_args().names or NAMES:
        print(f"== {name}", flush=True)
        if subprocess.run(command(name), check=False).returncode != 0:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
