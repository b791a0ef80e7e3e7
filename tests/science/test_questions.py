"""Questions, splits and files: nothing that is asked has been trained on, and numbers are written digit by digit."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from examples.science.duplicates import near_duplicates
from examples.science.make import all_splits, asked_of, make_questions, make_subjects, questions, read_asked, records
from examples.science.settings import Settings, SettingsError, SplitSettings, read_settings
from examples.science.splits import DataError, check, shared_keys, split_subjects
from examples.science.subject import Subject, read_subjects
from examples.science.tasks import TASKS, parse_design, parse_number

SCIENCE = Path(__file__).parents[2] / "examples" / "science"
SAMPLE = SCIENCE / "sample"
DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def smoke(tmp_path: Path) -> Settings:
    return replace(read_settings(SCIENCE / "smoke.toml"), output=tmp_path, subjects=SAMPLE)


def subject(key: str, group: str = "", **other: object) -> Subject:
    return Subject(key=key, group=group or key, text="CCO", **other)


@pytest.mark.parametrize(
    ("text", "number"), [("[6.82]", 6.82), (" [123", 123), ("-0.5]", -0.5), ("low", None), ("[]", None)]
)
def test_numbers_are_read_from_answers(text: str, number: float | None) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("text", "design"), [("[CCO]", "CCO"), (" [K L] ", "K L"), ("CCO", None), ("[]", None), ("[CCO", None)]
)
def test_designs_stand_between_brackets(text: str, design: str | None) -> None:
    assert parse_design(text) == design


def test_every_digit_and_bracket_of_an_answer_is_a_token(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in ("[6.82]", "[1234]", "[0.07]"):
        assert [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]] == list(text)


@pytest.mark.parametrize(
    ("domain", "task"),
    [
        ("quantum", "gap_level"),
        ("materials", "bulk_level"),
        ("chemistry", "melting_level"),
        ("peptides", "antimicrobial"),
    ],
)
def test_word_questions_read_as_in_the_data_of_the_repository(domain: str, task: str) -> None:
    line = (DATA / domain / "test.jsonl").read_text().splitlines()[0]
    known = json.loads(line)["messages"][0]["content"]
    asked = TASKS[task].ask(read_subjects(SAMPLE / f"{domain}.jsonl")[0], random.Random(0))
    assert asked is not None
    assert asked.prompt.split(" ")[0] == known.split(" ")[0]
    assert asked.prompt.rpartition(":")[2] == known.rpartition(":")[2]


def test_a_segment_has_the_state_of_most_of_its_residues() -> None:
    chain = Subject(key="a", group="a", text="A" * 30 + "G" * 30, values={"structure": "H" * 30 + "C" * 30})
    for seed in range(10):
        asked = TASKS["segment"].ask(chain, random.Random(seed))
        assert asked is not None
        assert asked.answer == ("helix" if asked.text.count("A") >= 14 else "coil")


def test_groups_stay_together_and_reserved_subjects_are_nowhere() -> None:
    members = [subject(f"{group}-{i}", str(group)) for group in range(40) for i in range(3)]
    members.append(subject("held", "held", reserved=True))
    settings = SplitSettings(test=10, valid=10, per_group=2, largest=5)
    splits = split_subjects(members, settings, 0, apart=["0-0"])
    check(splits)
    assert [len(splits[name]) for name in ("test", "valid")] == [10, 10]
    keys = {each.key for part in splits.values() for each in part}
    assert not keys & {"held", "0-0"}
    held_out = {each.group for name in ("test", "valid") for each in splits[name]}
    assert not held_out & {each.group for each in splits["train"]}


def test_large_groups_are_never_held_out() -> None:
    members = [subject(f"family-{i}", "family") for i in range(50)] + [subject(str(i)) for i in range(40)]
    splits = split_subjects(members, SplitSettings(test=15, valid=15, largest=20), 0, ())
    assert sum(each.group == "family" for each in splits["train"]) == 50


def test_too_few_subjects_and_torn_groups_are_errors() -> None:
    with pytest.raises(DataError, match="smaller"):
        split_subjects([subject(str(i)) for i in range(5)], SplitSettings(test=4, valid=4), 0, ())
    with pytest.raises(DataError, match="two splits"):
        check({"test": [subject("a", "one")], "train": [subject("b", "one")]})


def test_records_keep_the_shares_and_repeat_subjects_in_other_words() -> None:
    subjects = read_subjects(SAMPLE / "materials.jsonl")
    made = records("materials", subjects, {"bulk": 3, "bulk_level": 1}, 200, seed=0)
    bulk = [asked for asked in made if asked.prompt.startswith("CalculateBulkModulus")]
    assert (len(made), len(bulk)) == (200, 150)
    assert len({asked.prompt for asked in bulk}) > len(subjects)
    assert records("materials", subjects, {"bulk": 3, "bulk_level": 1}, 200, seed=0) == made


def test_a_task_of_which_no_subject_is_asked_is_an_error() -> None:
    with pytest.raises(ValueError, match="bulk"):
        asked_of("materials", [subject("a")], TASKS["bulk"], 3, random.Random(0), rewrite=True)


def test_files_of_a_run_hold_nothing_of_test_in_train(smoke: Settings) -> None:
    make_subjects(smoke, smoke.output / "none")
    make_questions(smoke)
    splits, subjects, shared = all_splits(smoke)
    for domain, parts in splits.items():
        trained = {asked.key for asked in read_asked(smoke.output / f"data/{domain}.train.jsonl")}
        assert trained <= {each.key for each in parts["train"]}
        assert not trained & {each.key for each in parts["test"]}
    assert shared["quantum+chemistry"]
    assert not set(shared["quantum+chemistry"]) & {each.key for part in splits["quantum"].values() for each in part}
    assert set(shared["quantum+chemistry"]) <= set(shared_keys(subjects["quantum"], subjects["chemistry"], 100, 26))
    facts = json.loads((smoke.output / "data/facts.json").read_text())
    assert facts["quantum"]["training_records"] == 8


def test_the_same_questions_are_asked_in_every_run() -> None:
    subjects = read_subjects(SAMPLE / "protein.jsonl")
    assert questions(TASKS["segment"], subjects, 9, 1) == questions(TASKS["segment"], subjects, 9, 1)


def test_planted_near_duplicates_are_counted() -> None:
    def of(*texts: str) -> list[Subject]:
        return [Subject(key=text, group=text, text=text) for text in texts]

    formulas = {"train": of("Al20O30"), "test": of("Al21O29", "NaCl")}
    assert near_duplicates("materials", formulas, 0)["share"] == 0.5
    chains = {"train": of("ACDEFGHIKLMNPQRSTVWY"), "test": of("ACDEFGHIKLMNWWWWWWWW", "VVVVVVVVVVVVVVVV")}
    assert near_duplicates("protein", chains, 0)["share"] == 0.5
    molecules = {"train": of("CCc1ccccc1O"), "test": of("Oc1ccccc1CC", "CCCCN")}
    assert near_duplicates("barrier", molecules, 0)["share"] == 0.5


def test_unknown_and_missing_settings_are_told_with_their_place(tmp_path: Path) -> None:
    text = (SCIENCE / "smoke.toml").read_text()
    path = tmp_path / "settings.toml"
    for old, new, told in (
        ("rank = 4", "rank = 4\nrang = 5", "lora.*rang"),
        ("warmup_steps = 1\n", "", "lora.*warmup_steps"),
        ("[experts.barrier]", "[experts.alchemy]", "alchemy"),
        ("seed = 26", "seed = ", "TOML"),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(SettingsError, match=told):
            read_settings(path)
