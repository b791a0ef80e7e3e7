"""Make examples/science/sample: a few subjects of each domain, so that the steps can be tried without the packages.

python -m examples.science.sample --subjects runs/science/subjects
"""

import argparse
from pathlib import Path

from rows import draw

from examples.science.make import SHARED
from examples.science.settings import DOMAINS
from examples.science.splits import shared_keys
from examples.science.subject import Subject, read_subjects, write_subjects

NUM_SUBJECTS = 60
NUM_SHARED = 16  # molecules of each pair of domains
MAX_TEXT = 120  # characters
SEED = 26


def sample(subjects: dict[str, list[Subject]]) -> dict[str, list[Subject]]:
    """Short subjects that data/ doesn't hold out, and some that two domains share."""
    usable = {
        domain: [each for each in found if not each.reserved and len(each.text) <= MAX_TEXT]
        for domain, found in subjects.items()
    }
    wanted: dict[str, set[str]] = {domain: set() for domain in usable}
    for one, other in SHARED.values():
        for key in shared_keys(usable[one], usable[other], NUM_SHARED, SEED):
            wanted[one].add(key)
            wanted[other].add(key)
    for domain, found in usable.items():
        ordered = sorted(found, key=lambda each: draw(SEED, "sample", each.key))
        wanted[domain] |= {each.key for each in ordered[:NUM_SUBJECTS]}
    return {domain: [each for each in found if each.key in wanted[domain]] for domain, found in usable.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("examples/science/sample"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    found = {domain: read_subjects(options.subjects / f"{domain}.jsonl") for domain in DOMAINS}
    for domain, subjects in sample(found).items():
        write_subjects(options.output / f"{domain}.jsonl", subjects)


if __name__ == "__main__":
    main()
