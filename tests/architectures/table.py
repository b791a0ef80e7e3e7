"""The table in docs/architectures.md: `python -m tests.architectures.table` runs every variant and writes it."""

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers

from tests.architectures.checks import FEATURES, Case, Outcome, outcome
from tests.architectures.decode_path import COLUMN, PAGE, decode_path
from tests.architectures.variants import ARCHS, kind_of

_BEGIN = "| variant | "
_ROW = "| `{}` | {} |"
# What a kind of model has no use for: encoders generate nothing, and the residuals are those of decoders and encoders.
NOT_FOR: Mapping[str, tuple[str, ...]] = {
    "mlm": ("generate", "engine", "engine in bfloat16"),
    "seq2seq": (),
    "vlm": (),
    "causal": (),
}

Outcomes = Mapping[str, Outcome]


def features_of(name: str) -> list[str]:
    """The features that are run for a variant."""
    return [feature for feature in FEATURES if feature not in NOT_FOR[kind_of(name)]]


def outcomes_of(name: str) -> Outcomes:
    """Run one variant. Raises AssertionError for a wrong row, and whatever isn't a typed refusal."""
    case = Case(name)
    return {feature: outcome(case, feature) for feature in features_of(name)}


def words_on_page(page: Path = PAGE) -> dict[str, dict[str, str]]:
    """By variant and feature what the page says: "equal" or "refused"; features that aren't run are left out."""
    rows = {}
    for line in page.read_text().splitlines():
        if line.startswith("| `"):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            words = zip(FEATURES, (cell.partition(" ")[0] for cell in cells[:-1]), strict=True)
            rows[first.strip("`")] = {feature: word for feature, word in words if word != "-"}
    return rows


def table(rows: Mapping[str, Outcomes]) -> str:
    """The rows, and the reasons of refusals below them."""
    reasons: list[str] = []
    columns = [*FEATURES, COLUMN]
    lines = [_BEGIN + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, outcomes in rows.items():
        cells = [*(_cell(outcomes.get(feature), reasons) for feature in FEATURES), decode_path(name)]
        lines.append(_ROW.format(name, " | ".join(cells)))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes, ""])


def _cell(found: Outcome | None, reasons: list[str]) -> str:
    if found is None:
        return "-"
    if found.refusal is None:
        return "equal"
    if found.refusal not in reasons:
        reasons.append(found.refusal)
    return f"refused ({reasons.index(found.refusal) + 1})"


def write(rows: Mapping[str, Outcomes], page: Path = PAGE) -> None:
    """Replace the page's table and everything below it."""
    above, _, _ = page.read_text().partition(_BEGIN)
    page.write_text(above + table(rows))


def main(names: Sequence[str]) -> int:
    """Run the named variants, or all and write the page; the number of variants with a wrong row."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    rows, wrong = {}, 0
    for name in names or ARCHS:
        try:
            rows[name] = outcomes_of(name)
        except Exception as error:
            wrong += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        print(name, *(f"{feature}: {found.refusal or 'equal'}" for feature, found in rows[name].items()), sep="\n    ")
    if not names and not wrong:
        write(rows)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
