"""The file of keys, and the limits of a key over time."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from loraplex.cli.app import cli
from loraplex.errors import ConfigError
from loraplex.server.api.api_errors import ApiError
from loraplex.server.auth.keys import KeyFile, KeyRecord
from loraplex.server.auth.rate_limit import Attempts, Cost, KeyUsage


def test_only_the_whole_key_is_known(tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    key, record = file.create(use=("a",))
    other, _ = file.create()
    fresh = KeyFile(tmp_path / "keys.json")
    assert fresh.find(key) == fresh.find(key) == record
    head, key_id, secret = key.split("_", 2)
    wrong = [key[:-1], key + "x", f"{head}_{key_id}_{other.split('_', 2)[2]}", f"x_{key_id}_{secret}", secret, "", "_"]
    assert [fresh.find(guess) for guess in wrong] == [None] * len(wrong)


def test_command_line_makes_lists_and_revokes_keys(tmp_path):
    run, file = CliRunner().invoke, str(tmp_path / "keys.json")
    made = run(cli, ["key", "create", "--keys-file", file, "--note", "lab", "--use", "a*", "--max-concurrent", "3"])
    key = made.stdout.splitlines()[0]
    record = KeyFile(file).find(key)
    assert (record.note, record.use, record.load, record.max_concurrent) == ("lab", ("a*",), (), 3)
    listed = run(cli, ["key", "list", "--keys-file", file]).stdout
    assert record.id in listed
    assert record.hash not in listed
    assert record.salt not in listed
    assert run(cli, ["key", "revoke", record.id, "--keys-file", file]).exit_code == 0
    assert KeyFile(file).find(key) is None


@pytest.mark.parametrize("text", ["{}", "no json", '{"keys": [{"id": "x"}]}', '{"keys": [{"rights": 1}]}'])
def test_damaged_files_open_nothing(tmp_path, text):
    file = KeyFile(tmp_path / "keys.json")
    key, _ = file.create()
    file.path.write_text(text)
    if text == '{"keys": []}':
        assert KeyFile(file.path).find(key) is None
        return
    with pytest.raises(ConfigError):
        KeyFile(file.path).find(key)


def usage(clock, **limits):
    return KeyUsage(KeyRecord(id="x", salt="0" * 32, hash="0" * 64, **limits), clock)


def test_requests_a_minute_refill_steadily():
    now = [0.0]
    key = usage(lambda: now[0], requests_per_minute=6)
    for _ in range(6):
        key.enter(Cost.GENERATING)
    with pytest.raises(ApiError, match="requests of the minute") as refused:
        key.enter(Cost.GENERATING)
    assert refused.value.retry_after_s == pytest.approx(10)
    now[0] = 10.01
    key.enter(Cost.GENERATING)
    with pytest.raises(ApiError):
        key.enter(Cost.GENERATING)


def test_tokens_are_paid_afterwards_and_debts_first():
    now = [0.0]
    key = usage(lambda: now[0], tokens_per_minute=60)
    key.enter(Cost.GENERATING)
    key.spend_tokens(120)
    with pytest.raises(ApiError, match="tokens of the minute"):
        key.enter(Cost.GENERATING)
    now[0] = 61
    key.enter(Cost.GENERATING)


def test_concurrent_requests():
    key = usage(lambda: 0.0, max_concurrent=2)
    key.enter(Cost.GENERATING)
    key.enter(Cost.GENERATING)
    with pytest.raises(ApiError, match="2 requests running"):
        key.enter(Cost.GENERATING)
    key.leave(Cost.GENERATING)
    key.enter(Cost.GENERATING)


def test_reading_counts_against_nothing_and_changing_not_against_tokens():
    key = usage(lambda: 0.0, requests_per_minute=1, tokens_per_minute=1, max_concurrent=1)
    key.enter(Cost.CHANGING)
    for _ in range(5):
        key.enter(Cost.READING)
    with pytest.raises(ApiError):
        key.enter(Cost.CHANGING)
    other = usage(lambda: 0.0, tokens_per_minute=1)
    other.spend_tokens(100)
    other.enter(Cost.CHANGING)
    with pytest.raises(ApiError):
        other.enter(Cost.GENERATING)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_concurrent": 0},
        {"use": "team-b/*"},
        {"use": [""]},
        {"load": "x"},
        {"manage": "false"},
        {"manage": 1},
        {"base": "no"},
        {"base": None},
        {"tokens_per_minute": "30"},
        {"tokens_per_minute": 30.5},
        {"tokens_per_minute": True},
        {"requests_per_minute": -1},
        {"max_priority": "high"},
        {"shared_prefixes": "true"},
        {"salt": "zz"},
        {"hash": ""},
        {"hash": "0" * 64 + "\n"},
        {"id": "a_b"},
        {"id": 5},
        {"created": "now"},
        {"rights": ["*"]},
        {"roots": "team-a"},
        {"roots": ["../team-b"]},
    ],
)
def test_records_in_doubt_open_nothing(tmp_path, wrong):
    file = KeyFile(tmp_path / "keys.json")
    key, record = file.create()
    content = json.loads(file.path.read_text())
    content["keys"][0] |= wrong
    file.path.write_text(json.dumps(content))
    fresh = KeyFile(file.path)
    for _ in range(2):  # and not only the first time
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            fresh.find(key)
    assert record.hash not in str(fresh._fault)


@pytest.mark.parametrize("change", [("{", '{"keys": [], '), ('"manage":', '"manage": true, "manage":')])
def test_fields_that_stand_there_twice_open_nothing(tmp_path, change):
    file = KeyFile(tmp_path / "keys.json")
    key, _ = file.create()
    text = file.path.read_text().replace(*change, 1)
    file.path.write_text(text)
    with pytest.raises(ConfigError, match="twice"):
        KeyFile(file.path).find(key)


def test_two_records_of_one_id_open_nothing(tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    key, _ = file.create()
    content = json.loads(file.path.read_text())
    file.path.write_text(json.dumps({"keys": content["keys"] * 2}))
    with pytest.raises(ConfigError, match="several keys"):
        KeyFile(file.path).find(key)


def test_a_file_that_is_gone_opens_nothing(tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    key, _ = file.create()
    assert file.find(key)
    file.path.unlink()
    file._looked = -10
    for _ in range(2):
        with pytest.raises(ConfigError, match="can't be read"):
            file.find(key)


def test_changes_at_the_same_time_are_all_kept(tmp_path):
    path = tmp_path / "keys.json"
    for _ in range(20):
        revoked, record = KeyFile(path).create()
        with ThreadPoolExecutor(2) as pool:
            ending = pool.submit(KeyFile(path).revoke, record.id)
            made = pool.submit(KeyFile(path).create)
            ending.result()
            key, _ = made.result()
        assert KeyFile(path).find(revoked) is None, "a revoked key is valid again"
        assert KeyFile(path).find(key) is not None, "a new key was lost"
    assert len(KeyFile(path).records()) == 20
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == ["keys.json"]


def test_a_key_that_may_load_needs_roots(tmp_path):
    run, file = CliRunner().invoke, str(tmp_path / "keys.json")
    refused = run(cli, ["key", "create", "--keys-file", file, "--load", "team-a/*"])
    assert isinstance(refused.exception, ConfigError)
    made = run(cli, ["key", "create", "--keys-file", file, "--load", "team-a/*", "--root", "team-a"])
    assert KeyFile(file).find(made.stdout.splitlines()[0]).roots == ("team-a",)


def test_wrong_keys_are_counted_by_address():
    attempts = Attempts(3)
    for _ in range(3):
        attempts.begin("10.0.0.1")
    with pytest.raises(ApiError, match="too many wrong keys") as refused:
        attempts.begin("10.0.0.1")
    assert refused.value.status.number == 429
    attempts.begin("10.0.0.2")
    for _ in range(10):
        attempts.begin("10.0.0.3")
        attempts.succeeded("10.0.0.3")
    for host in range(3):
        attempts.begin(f"2001:db8::{host + 1:x}")
    with pytest.raises(ApiError):
        attempts.begin("2001:db8::ffff")


def test_wrong_limits_are_refused_when_a_key_is_made(tmp_path):
    with pytest.raises(ConfigError, match="max_concurrent"):
        KeyFile(tmp_path / "keys.json").create(max_concurrent=0)
