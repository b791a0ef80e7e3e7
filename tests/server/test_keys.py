"""The file of keys, and the limits of a key over time."""

import pytest
from typer.testing import CliRunner

from loraplex.cli.app import cli
from loraplex.errors import ConfigError
from loraplex.server.api_errors import ApiError
from loraplex.server.keys import KeyFile, KeyRecord
from loraplex.server.rates import KeyUsage


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
    return KeyUsage(KeyRecord(id="x", salt="", hash="", **limits), clock)


def test_requests_a_minute_refill_steadily():
    now = [0.0]
    key = usage(lambda: now[0], requests_per_minute=6)
    for _ in range(6):
        key.enter()
    with pytest.raises(ApiError, match="requests of the minute") as refused:
        key.enter()
    assert refused.value.retry_after_s == pytest.approx(10)
    now[0] = 10.01
    key.enter()
    with pytest.raises(ApiError):
        key.enter()


def test_tokens_are_paid_afterwards_and_debts_first():
    now = [0.0]
    key = usage(lambda: now[0], tokens_per_minute=60)
    key.enter()
    key.spend_tokens(120)
    with pytest.raises(ApiError, match="tokens of the minute"):
        key.enter()
    now[0] = 61
    key.enter()


def test_concurrent_requests():
    key = usage(lambda: 0.0, max_concurrent=2)
    key.enter()
    key.enter()
    with pytest.raises(ApiError, match="2 requests running"):
        key.enter()
    key.leave()
    key.enter()


def test_limits_are_checked():
    with pytest.raises(ConfigError, match="max_concurrent is 0"):
        KeyRecord(id="x", salt="", hash="", max_concurrent=0)
