"""One schema for file, environment and flags."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex.cli.app import cli
from loraplex.errors import ConfigError
from loraplex.server.settings import ServeConfig
from loraplex.server.settings_sources import as_toml, load_config, options

FILE = """
[model]
served_name = "base"
adapters = {protein = "folder"}
[network]
port = 1234
keep_alive_s = 5
[access]
adapter_roots = ["/tmp"]
[engine]
max_running = 3
prefix_cache = false
[store]
host_bytes = 1000
"""


def test_later_sources_go_before_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(FILE)
    environment = {
        "LORAPLEX_SERVE_PORT": "2345",
        "LORAPLEX_SERVE_MAX_RUNNING": "4",
        "LORAPLEX_SERVE_HOST_BYTES": "none",
    }
    config = load_config(tmp_path / "serve.toml", environment | {"LORAPLEX_CACHE": "x"}, {"max_running": 5})
    assert (config.model.base_name, config.model.adapters) == ("base", {"protein": "folder"})
    assert (config.network.port, config.network.keep_alive_s) == (2345, 5)
    assert (config.engine.max_running, config.engine.prefix_cache, config.store.host_bytes) == (5, False, None)
    assert config.access.adapter_roots == ("/tmp",)
    assert config.limits == ServeConfig().limits


def test_what_is_printed_gives_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(FILE)
    config = load_config(tmp_path / "serve.toml", {})
    (tmp_path / "again.toml").write_text(as_toml(config))
    assert load_config(tmp_path / "again.toml", {}) == config


def test_json_files_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "serve.json").write_text(json.dumps({"network": {"port": 7}}))
    assert load_config(tmp_path / "serve.json", {}).network.port == 7


def test_a_model_whose_name_is_longer_than_a_file_s_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(f"[model]\nmodel = '{'x' * 5000}'")
    assert load_config(tmp_path / "serve.toml", {}).model.base_name == "x" * 5000


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[network]\nport = 70000", "port is 70000; it must be 0 to 65535"),
        ("[network]\nport = '80'", r"\[network\] port is '80'; it must be a whole number"),
        ("[network]\nports = 80", r"\[network\] has no option 'ports'. It has"),
        ("[nets]\nport = 80", "'nets' is no section. Sections"),
        ("[engine]\nmax_running = true", r"\[engine\] max_running is True"),
        ("[engine]\nmax_running = 0", "max_running is 0"),
        ("[model]\nadapters = ['x']", "it must be a table of texts"),
        ("[access]\nadapter_roots = ['/no/such']", "'/no/such', which is no folder"),
        ("[limits]\nbody_timeout_s = inf", "body_timeout_s is inf"),
        (f"[access]\nadapter_roots = ['/{'x' * 5000}']", "which is no folder"),
        (f"[network]\ntls_key = 'x'\ntls_certificate = '{'x' * 5000}'", "which is no file"),
        ("[network]\ntls_key = 'x'", "tls_certificate, tls_key: give both"),
        ("[logs]\nlog_level = 'loud'", "log_level is 'loud'"),
        ("port = ", "can't be read"),
    ],
)
def test_wrong_files_name_what_is_wrong(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_config(tmp_path / "serve.toml", {})


@pytest.mark.parametrize(
    ("variable", "value", "match"),
    [
        ("PORT", "x", "LORAPLEX_SERVE_PORT is 'x'; it must be a whole number"),
        ("PORTS", "1", "LORAPLEX_SERVE_PORTS is no option"),
        ("DRAFT", "maybe", "LORAPLEX_SERVE_DRAFT is 'maybe'"),
        ("ADAPTERS", "x", "NAME=VALUE"),
    ],
)
def test_wrong_variables_name_what_is_wrong(variable: str, value: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_config(None, {f"LORAPLEX_SERVE_{variable}": value})


def test_every_option_is_a_variable_and_a_flag() -> None:
    names = [option.name for option in options()]
    assert len(set(names)) == len(names)
    arguments = [
        "serve",
        "--print-config",
        "--port",
        "9",
        "--no-prefix-cache",
        "--adapter",
        "p=f",
        "--adapter-root",
        "/",
    ]
    printed = CliRunner().invoke(cli, arguments, env={"LORAPLEX_SERVE_DRAFT": "no"})
    assert printed.exit_code == 0, printed.output
    for line in (
        "port = 9",
        "prefix_cache = false",
        "draft = false",
        'adapters = {"p" = "f"}',
        'adapter_roots = ["/"]',
    ):
        assert line in printed.output.splitlines()


def test_the_documentation_names_every_option_with_its_section() -> None:
    docs = Path(__file__).parent.parent.parent / "docs"
    serving, engine = ((docs / name).read_text(encoding="utf-8") for name in ("serving.md", "engine.md"))
    table = serving[serving.index("## Settings") : serving.index("## Security")]
    known = list(options())
    for option in known:
        assert f"`{option.name}`" in (engine if option.section == "engine" else table), option.name
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, flags=re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told <= {option.name for option in known}, "the page names options that aren't there"


@pytest.mark.slow  # a process of its own
def test_the_command_line_needs_no_web_framework_before_it_serves() -> None:
    code = "import sys, loraplex.cli.app; assert 'fastapi' not in sys.modules and 'uvicorn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)
