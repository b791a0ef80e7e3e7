"""Environment variables: empty is not set, and nonsense is refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex.environment import cache_folder, switch, variable
from loraplex.errors import ConfigError
from loraplex.kernels import native
from loraplex.server.settings_sources import load_config


@pytest.mark.parametrize("value", [None, "", " "])
def test_an_empty_value_is_as_none(value: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LORAPLEX_CACHE", "LORAPLEX_NATIVE", "CXX"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path.home() / ".cache" / "loraplex"
    assert switch("LORAPLEX_NATIVE", default=True)
    assert not switch("LORAPLEX_NATIVE", default=False)
    assert variable("CXX", "c++") == "c++"


def test_switches_take_the_words_for_on_and_off_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in {"1": True, "On": True, "YES": True, "0": False, "false": False, "no": False}.items():
        monkeypatch.setenv("LORAPLEX_NATIVE", text)
        assert switch("LORAPLEX_NATIVE", default=not expected) == expected
    monkeypatch.setenv("LORAPLEX_NATIVE", "disabled")
    with pytest.raises(ConfigError, match="LORAPLEX_NATIVE is 'disabled'; it must be one of"):
        switch("LORAPLEX_NATIVE", default=True)


def test_the_cache_may_be_in_the_home_folder_but_not_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", "~/x/loraplex")
    assert cache_folder() == Path.home() / "x" / "loraplex"
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("LORAPLEX_CACHE", str(place))
        with pytest.raises(ConfigError, match=r"file' is no folder\. Set LORAPLEX_CACHE"):
            cache_folder()


@pytest.mark.parametrize("value", ["0", "off"])
def test_the_compiled_kernel_can_be_turned_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_NATIVE", value)
    assert not native._load.__wrapped__()


def test_nothing_is_built_into_the_working_directory(tmp_path: Path) -> None:
    """In a process of its own: the kernel's library is found through the variable when it is first used."""
    code = "from loraplex.kernels.library import library_path; print(library_path())"
    environment = {**os.environ, "LORAPLEX_CACHE": "", "HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(Path(native.__file__).parents[2])
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert ran.stdout.startswith(str(tmp_path / "home" / ".cache" / "loraplex" / "kernels"))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_setting_of_the_server_does_not_undo_its_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(f"[access]\nkeys_file = '{tmp_path}/keys.json'\n[network]\nport = 1234\n")
    config = load_config(file, {"LORAPLEX_SERVE_KEYS_FILE": "", "LORAPLEX_SERVE_PORT": " "})
    assert (config.access.keys_file, config.network.port) == (f"{tmp_path}/keys.json", 1234)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_settings_are_finite(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"LORAPLEX_SERVE_DRAIN_S is .*{value[-2:] if value != '1e999' else 'inf'}"):
        load_config(None, {"LORAPLEX_SERVE_DRAIN_S": value})
