"""Molecules by RDKit: identity, scaffold, other ways to write them, fingerprints."""

from functools import cache

import numpy as np
from rdkit import Chem, DataStructs, RDLogger
from rdkit.Chem import Descriptors, rdFingerprintGenerator
from rdkit.Chem.Scaffolds import MurckoScaffold

RDLogger.DisableLog("rdApp.*")  # a string that is no molecule is an answer to count, not an error to print
BITS = 2048
SKELETON = 14  # characters of an InChIKey that encode the molecule without its stereochemistry


def parse(smiles: str) -> Chem.Mol | None:
    """The molecule, or None for a string that is none."""
    molecule = Chem.MolFromSmiles(smiles) if smiles.strip() else None
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def canonical(smiles: str) -> str | None:
    """RDKit's SMILES of the molecule without stereochemistry, or None."""
    molecule = parse(smiles)
    return None if molecule is None else Chem.MolToSmiles(molecule, isomericSmiles=False)


def skeleton_of_inchi(inchi: str) -> str:
    return str(Chem.InchiToInchiKey(inchi))[:SKELETON]


def scaffold(smiles: str, key: str) -> str | None:
    """Bemis and Murcko's scaffold; a molecule without rings has none and is named by its key. None: not a molecule."""
    molecule = parse(smiles)
    if molecule is None:
        return None
    return str(MurckoScaffold.MurckoScaffoldSmiles(mol=molecule)) or f"acyclic {key}"


def rewritten(smiles: str, seed: int) -> str:
    """The same molecule written from another atom on, with aromatic atoms in lower case where they were before."""
    molecule = parse(smiles)
    if molecule is None:
        return smiles
    plain = Chem.MolFromSmiles(smiles, sanitize=False)
    kekule = not any(atom.GetIsAromatic() for atom in plain.GetAtoms())
    order = np.random.default_rng(seed).permutation(molecule.GetNumAtoms()).tolist()
    other = Chem.RenumberAtoms(molecule, order)
    if kekule:
        Chem.Kekulize(other, clearAromaticFlags=True)
    return str(Chem.MolToSmiles(other, canonical=False, kekuleSmiles=kekule))


@cache
def _generator() -> object:
    return rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=BITS)


def morgan_counts(smiles: str) -> np.ndarray:  # [BITS]
    """How often each circular substructure of up to two bonds occurs, hashed."""
    molecule = parse(smiles)
    if molecule is None:
        return np.zeros(BITS, dtype=np.float32)
    return _generator().GetCountFingerprintAsNumPy(molecule).astype(np.float32)


def descriptors(smiles: str) -> np.ndarray:  # [descriptors]
    """RDKit's two-dimensional descriptors; what can't be computed is 0."""
    molecule = parse(smiles)
    if molecule is None:
        return np.zeros(len(Descriptors.descList), dtype=np.float32)
    with np.errstate(all="ignore"):
        values = np.array([compute(molecule) for _, compute in Descriptors.descList], dtype=np.float64)
        return np.nan_to_num(np.clip(values, -1e6, 1e6)).astype(np.float32)


def nearest_similarities(some: list[str], others: list[str]) -> list[float]:
    """For each of `some`, the largest Tanimoto similarity of Morgan fingerprints to one of `others`."""
    prints = [_generator().GetFingerprint(molecule) for molecule in map(parse, others) if molecule is not None]
    found = []
    for smiles in some:
        molecule = parse(smiles)
        near = DataStructs.BulkTanimotoSimilarity(_generator().GetFingerprint(molecule), prints) if molecule else [0.0]
        found.append(max(near, default=0.0))
    return found
