"""What the libraries' models see of a subject: n-grams of its text, and what the field uses.

Molecules: counts of circular substructures (Morgan, radius 2) and RDKit's descriptors. Crystals: shares of elements,
and statistics of the elements' properties. Residues: composition, pairs, and where all have one length, the residue at
each place.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

from examples.science.formulas import element_statistics, fractions
from examples.science.molecules import descriptors, morgan_counts
from examples.science.sources.peptides import net_charge

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
MAX_GRAMS = 6000
WINDOW = 17  # residues around the one whose state is asked for


class NGrams:
    """log(1 + count) of the most widespread runs of 1 to 3 characters of train."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._counts = CountVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False, max_features=MAX_GRAMS)
        self._counts.fit(texts)

    def __call__(self, texts: Sequence[str]) -> sparse.csr_matrix:  # [texts, grams]
        return self._counts.transform(texts).astype(np.float32).log1p()


def field_features(domain: str, texts: Sequence[str]) -> sparse.csr_matrix:  # [texts, features]
    """The features that the domain's own literature uses."""
    places = domain == "protein" and len({len(text) for text in texts}) == 1
    return sparse.vstack([_row(domain, text, places) for text in texts], format="csr", dtype=np.float32)


@cache  # a domain's tasks ask about the same subjects
def _row(domain: str, text: str, places: bool) -> sparse.csr_matrix:  # [1, features]
    compute = {"materials": _of_formula, "protein": _of_residues, "peptides": _of_residues}.get(domain, _of_molecule)
    return sparse.csr_matrix(np.concatenate([compute(text), _places(text)]) if places else compute(text))


def _of_molecule(smiles: str) -> np.ndarray:
    return np.concatenate([np.log1p(morgan_counts(smiles)), descriptors(smiles)])


def _of_formula(formula: str) -> np.ndarray:
    return np.concatenate([fractions(formula), element_statistics(formula)])


def _of_residues(residues: str) -> np.ndarray:
    """Length, charge, share of each residue, and of each pair of neighbours."""
    size = len(residues)
    single = [residues.count(residue) / size for residue in RESIDUES]
    pairs = np.zeros((len(RESIDUES), len(RESIDUES)), dtype=np.float32)
    for one, other in pairwise(residues):
        if one in RESIDUES and other in RESIDUES:
            pairs[RESIDUES.index(one), RESIDUES.index(other)] += 1 / size
    return np.concatenate([[size, net_charge(residues)], single, pairs.ravel()]).astype(np.float32)


def _places(residues: str) -> np.ndarray:  # [residues * 20]
    return np.array([float(residue == each) for residue in residues for each in RESIDUES], dtype=np.float32)


def windows(residues: str) -> np.ndarray:  # [residues, WINDOW * 21], of which one column a place says "outside"
    """For each residue those around it, one-hot."""
    letters = RESIDUES + "-"
    half = WINDOW // 2
    padded = "-" * half + residues + "-" * half
    codes = np.array([letters.find(letter) for letter in padded])
    around = np.lib.stride_tricks.sliding_window_view(codes, WINDOW)  # [residues, WINDOW]
    return np.eye(len(letters), dtype=np.float32)[around].reshape(len(residues), -1)
