"""Scores equal those of scikit-learn, and designs are judged by the rules that the page states."""

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score

from examples.science.designs import KINDS
from examples.science.features import field_features, windows
from examples.science.gates import summary
from examples.science.scores import label_scores, number_scores, word_scores
from examples.science.table import median_number


def test_numbers_are_scored_as_scikit_learn_does() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(7, 1.3, 400)
    guess = truth + draw.normal(0, 0.5, 400)
    found = number_scores(guess.tolist(), truth.tolist())
    assert found["r2"] == pytest.approx(r2_score(truth, guess), abs=1e-4)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, guess), rel=1e-3)
    assert found["mae_error"] == pytest.approx(np.abs(guess - truth).std() / 20, rel=1e-3)
    assert 0.003 < found["r2_error"] < 0.03


def test_an_answer_that_is_no_number_counts_as_the_mean() -> None:
    truth = [1.0, 2.0, 3.0]
    assert number_scores([None, None, None], truth)["r2"] == 0
    assert number_scores([None, 2.0, 3.0], truth)["numbers"] == pytest.approx(2 / 3, abs=1e-4)


def test_moduli_are_scored_in_logarithms_too() -> None:
    found = number_scores([10.0, 1000.0], [100.0, 1000.0], logarithms=True)
    assert found["mae_log10"] == pytest.approx(0.5)


def test_words_and_labels_are_counted() -> None:
    assert word_scores(["low", "high", "low", ""], ["low", "low", "low", "low"])["share"] == 0.5
    found = label_scores(["HHC", "H"], ["HHE", "HHH"])
    assert found["q3"] == pytest.approx(0.5)


def test_the_median_needs_more_numbers_than_other_answers() -> None:
    assert median_number(["[6.8]", "[7.0]", "[9.0]", "what"]) == 7.0
    assert median_number(["[6.8]", "what"]) is None


@pytest.mark.parametrize(
    ("kind", "wanted", "hit", "miss"),
    [
        ("molecule", 6.8, 7.04, 7.06),
        ("formula", 100, 109, 111),
        ("peptide", "antimicrobial, +5, 24", "antimicrobial, +6, 22", "other, +5, 24"),
        ("peptide", "antimicrobial, +5, 24", "antimicrobial, +4, 26", "antimicrobial, +3, 24"),
        ("peptide", "other, -1, 10", "other, +0, 12", "other, -1, 13"),
    ],
)
def test_designs_hit_within_their_tolerance(kind: str, wanted: object, hit: object, miss: object) -> None:
    assert KINDS[kind].hits(wanted, hit)
    assert not KINDS[kind].hits(wanted, miss)


def test_designs_that_are_none_are_not_valid() -> None:
    assert KINDS["molecule"].identity("C1CC") is None
    assert KINDS["formula"].identity("Xx2") is None
    assert KINDS["peptide"].identity("K L B") is None
    assert KINDS["peptide"].identity("K L") is None
    assert KINDS["peptide"].identity("K L W K K") == "KLWKK"


def test_equal_texts_have_equal_features_and_others_do_not() -> None:
    table = field_features("materials", ["Al2O3", "NaCl", "Al2O3"]).toarray()
    assert (table[0] == table[2]).all()
    assert (table[0] != table[1]).any()


def test_windows_show_each_residue_with_its_neighbours() -> None:
    table = windows("ACD").reshape(3, 17, 21)
    assert table.sum(axis=2).min() == 1
    assert [int(table[i, 8].argmax()) for i in range(3)] == [0, 1, 2]
    assert int(table[0, 7].argmax()) == 20  # outside


def test_ablation_tells_whether_the_named_expert_hurts_most() -> None:
    means = {"a": {"a": 0.7, "b": 0.2, "c": 0.1}, "b": {"a": 0.5, "b": 0.4, "c": 0.1}}
    right = {
        "nobody": {"a": 0.8, "b": 0.8},
        "a": {"a": 0.4, "b": 0.7},
        "b": {"a": 0.7, "b": 0.3},
        "c": {"a": 0.8, "b": 0.8},
    }
    found = summary(right, means)
    assert (found["hurts_most_in"], found["of"]) == (1, 2)
    assert found["domains"]["a"] == {"named": "a", "drop": 0.4, "mean_drop_of_others": 0.05, "hurts_most": True}
    assert found["domains"]["b"]["named"] == "a"
