"""Formulas, molecules and chains are read as their fields read them."""

import pytest
from rdkit import Chem

from examples.science import formulas, molecules
from examples.science.sources.peptides import net_charge
from examples.science.sources.protein import relatives

PHENOL, KEKULE = "c1ccccc1O", "OC1=CC=CC=C1"


@pytest.mark.parametrize("formula", ["", "al2O3", "Al2O3x", "Xx2O", "Al0O3", "Al2Al3", "Al999O2", "Al2 O3", "H2O)"])
def test_what_is_no_formula_is_refused(formula: str) -> None:
    assert formulas.parse(formula) is None


def test_compositions_are_reduced_and_ordered() -> None:
    assert formulas.reduced("O6Al4") == formulas.reduced("Al2O3") == "Al2 O3"
    assert formulas.chemical_system("O6Al4") == "Al-O"


def test_fractions_add_up_to_one_and_stand_at_the_elements_numbers() -> None:
    found = formulas.fractions("Al2O3")
    assert found.sum() == pytest.approx(1)
    assert (found[12], found[7]) == (pytest.approx(0.4), pytest.approx(0.6))


def test_statistics_of_an_element_alone_are_its_properties() -> None:
    found = formulas.element_statistics("Fe2").reshape(5, -1)
    assert found[0, 0] == 26
    assert found[0, 1] == pytest.approx(55.845, rel=1e-3)
    assert (found[1] == 0).all()
    assert (found[4] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_formula_in_another_order_is_the_same_composition(seed: int) -> None:
    assert formulas.reduced(formulas.reordered("Ag2Ca1Ge2", seed)) == "Ag2 Ca1 Ge2"


@pytest.mark.parametrize("smiles", [PHENOL, KEKULE, "CN1C=CC(C=O)C1=O", "[N+](=O)([O-])C1=CC=CC=C1"])
def test_a_rewritten_molecule_is_the_same_in_the_same_style(smiles: str) -> None:
    others = {molecules.rewritten(smiles, seed) for seed in range(20)}
    assert len(others) > 3
    assert {molecules.canonical(other) for other in others} == {molecules.canonical(smiles)}
    assert all(("c" in other) == ("c" in smiles) for other in others)


def test_stereoisomers_share_a_skeleton_and_constitutional_isomers_do_not() -> None:
    keys = [
        molecules.skeleton_of_inchi(Chem.MolToInchi(Chem.MolFromSmiles(text)))
        for text in ("C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "NCCC(=O)O")
    ]
    assert keys[0] == keys[1] != keys[2]


def test_scaffolds_are_of_ring_systems_and_molecules_without_rings_have_their_own() -> None:
    assert molecules.scaffold("CCc1ccccc1", "a") == molecules.scaffold("Oc1ccccc1", "b") == "c1ccccc1"
    assert molecules.scaffold("CCO", "a") != molecules.scaffold("CCO", "b")
    assert molecules.scaffold("no molecule", "a") is None


def test_what_is_no_molecule_has_no_identity() -> None:
    assert molecules.canonical("C1CC") is None
    assert molecules.canonical("") is None


def test_a_run_in_common_makes_relatives_also_through_a_third() -> None:
    one, two, three, other = "AAAAACCCCC", "CCCCCDDDDD", "DDDDDEEEEE", "WWWWWWWWWW"
    found = relatives([one, three, other, two], run=5)
    assert found[0] == found[1] == found[3] != found[2]


def test_charge_counts_basic_and_acidic_residues() -> None:
    assert net_charge("KKRDEH") == 1
