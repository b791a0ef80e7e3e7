"""Protein structure: is a segment of a chain mostly helix, sheet or coil?"""

from collections.abc import Iterable
from pathlib import Path

from domain import Domain
from packages import Package, open_member
from rows import Row, draw

WINDOW = 21
MIN_AGREEING = 14  # residues of the window in one state
SHARED_RUN = 10
STATES = {"H": "helix", "E": "sheet", "C": "coil"}
SEQUENCES = "gor4-1.0.1/gor4/data/new-gor4.seq"
STRUCTURES = "gor4-1.0.1/gor4/data/new-gor4.obs"


def records(archive: Path, member: str) -> list[str]:
    """Return the residue strings of a GOR file: "!name length", then lines, "@" at the end."""
    found: list[str] = []
    with open_member(archive, member) as stream:
        for line in stream:
            if line.startswith("!"):
                found.append("")
            else:
                found[-1] += line.strip().rstrip("@")
    return found


def runs(sequence: str) -> set[str]:
    """Return all runs of SHARED_RUN residues in a sequence."""
    return {sequence[start : start + SHARED_RUN] for start in range(len(sequence) - SHARED_RUN + 1)}


def windows(sequence: str, structure: str) -> list[tuple[str, str]]:
    """Return (state, segment) of every window with at least MIN_AGREEING residues in that state."""
    found = []
    for start in range(len(sequence) - WINDOW + 1):
        states = structure[start : start + WINDOW]
        for state in STATES:
            if states.count(state) >= MIN_AGREEING:
                found.append((state, sequence[start : start + WINDOW]))
    return found


def pick(chain: str, structure: str, seed: int) -> tuple[str, str] | None:
    """Return one random window of a chain, its state drawn first so that sheets are not drowned."""
    offered = windows(chain, structure)
    if not offered:
        return None
    state = min({state for state, _ in offered}, key=lambda name: draw(seed, chain, name))
    return min((item for item in offered if item[0] == state), key=lambda item: draw(seed, chain, item[1]))


def shared_runs(segments: Iterable[str], chains: Iterable[str]) -> set[str]:
    """Return the runs of the segments that occur in more than one chain."""
    seen = dict.fromkeys((run for segment in segments for run in runs(segment)), 0)
    for chain in chains:
        for run in runs(chain):
            if run in seen:
                seen[run] += 1
    return {run for run, count in seen.items() if count > 1}


def read(archive: Path, seed: int) -> list[Row]:
    """Return one row for each chain that offers a window of its own."""
    chains = dict(zip(records(archive, SEQUENCES), records(archive, STRUCTURES), strict=True))
    picked = {chain: pick(chain, structure, seed) for chain, structure in chains.items()}
    chosen = {chain: window for chain, window in picked.items() if window is not None}
    common = shared_runs((segment for _, segment in chosen.values()), chains)
    return [
        Row(f"Protein segment {' '.join(segment)}: helix, sheet or coil?", STATES[state], group=chain)
        for chain, (state, segment) in chosen.items()
        if common.isdisjoint(runs(segment))
    ]


PROTEIN = Domain(
    name="protein",
    title="Protein structure: the state of 21-residue segments (Protein Data Bank)",
    package=Package(
        name="gor4",
        version="1.0.1",
        file="gor4-1.0.1.tar.gz",
        sha256="a0c754e890c26ceb3f1b9501433a52e7ff866f79e23584b1c0843b36304373e5",
        licence="MIT",
    ),
    members=(SEQUENCES, STRUCTURES),
    labels=("helix", "sheet", "coil"),
    read=read,
    num_train=3000,
    rules=(
        f"Answers: the state (H, E or C) of at least {MIN_AGREEING} of a segment's {WINDOW} residues; the "
        "package's 13,244 chains (resolution below 2.5 Angstrom, clustered by its authors with CD-HIT at "
        "30 %) have one state for each residue.",
        "One segment from each chain, drawn at random: first a state among those that the chain offers, then "
        "the segment. Uniform sampling would give few sheets.",
        f"Segments with a run of {SHARED_RUN} residues that also occurs in another chain are left out: "
        "purification tags and close relatives.",
        "Split by chain. Homologous chains with less than that in common may still be in two splits.",
        "Residues are separated by spaces.",
    ),
    citations=(
        "J. Garnier, J.-F. Gibrat, B. Robson: GOR method for predicting protein secondary structure from "
        "amino acid sequence. Methods in Enzymology 266, 540 (1996), doi:10.1016/S0076-6879(96)66034-0",
        "H. M. Berman et al.: The Protein Data Bank. Nucleic Acids Research 28, 235 (2000), "
        "doi:10.1093/nar/28.1.235 (its file ss.txt of June 2016)",
        "W. Kabsch, C. Sander: Dictionary of protein secondary structure. Biopolymers 22, 2577 (1983), "
        "doi:10.1002/bip.360221211 (the states)",
    ),
    licence="The Protein Data Bank's data are in the public domain (CC0 1.0).",
)
