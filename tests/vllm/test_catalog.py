"""Names and paths: what they stand for, and that none leads out of the folder."""

from pathlib import Path

import pytest

from loraplex.errors import AdapterNotFoundError, ConfigError, LinkSyntaxError, RequestError
from loraplex.vllm_plugin.catalog import FolderCatalog
from loraplex.vllm_plugin.options import PluginOptions, options_from


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path):
    for name in ("protein", "team/materials", ".hidden"):
        make(tmp_path / "named" / name)
    make(tmp_path / "outside")
    return tmp_path / "named"


@pytest.fixture
def catalog(root, tmp_path):
    return FolderCatalog(PluginOptions(folder=str(root), adapters={"other": str(make(tmp_path / "elsewhere"))}))


def test_names_and_links_become_folders(catalog, root, tmp_path):
    assert catalog.find("protein") == ((root / "protein", 1.0),)
    assert catalog.find("team/materials:0.7+other:-2") == (
        (root / "team/materials", 0.7),
        (tmp_path / "elsewhere", -2.0),
    )
    assert catalog.find(str(root / "protein")) == ((root / "protein", 1.0),)


@pytest.mark.parametrize(
    "name", ["../outside", "protein/../../outside", "/etc", ".hidden", "team//materials", "protein/", "./protein"]
)
def test_names_that_lead_out_are_refused(catalog, name):
    with pytest.raises((RequestError, AdapterNotFoundError)):
        catalog.folder(name)


def test_symbolic_links_out_of_the_folder_are_not_followed(catalog, root, tmp_path):
    (root / "shortcut").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterNotFoundError):
        catalog.folder("shortcut")
    (root / "protein" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_config.json")
    with pytest.raises(RequestError, match="leads out"):
        catalog.folder("protein")


def test_paths_outside_are_refused_unless_allowed(catalog, root, tmp_path):
    with pytest.raises(RequestError, match="any_path"):
        catalog.find(str(tmp_path / "outside"))
    free = FolderCatalog(PluginOptions(folder=str(root), any_path=True))
    assert free.find(str(tmp_path / "outside")) == ((tmp_path / "outside", 1.0),)
    assert FolderCatalog(PluginOptions()).find(str(tmp_path / "outside")) == ((tmp_path / "outside", 1.0),)


def test_experts_of_a_named_mixture_must_be_allowed_too(catalog, root, tmp_path):
    assert catalog.check_expert(root / "science", root / "protein") == root / "protein"
    with pytest.raises(RequestError):
        catalog.check_expert(root / "science", tmp_path / "outside")
    with pytest.raises(Exception, match="hub id"):
        catalog.check_expert(root / "science", "owner/name")


def test_unknown_names_and_wrong_links_are_told_apart(catalog):
    with pytest.raises(AdapterNotFoundError, match="'nobody'"):
        catalog.link("protein+nobody:2")
    with pytest.raises(LinkSyntaxError):
        catalog.link("protein:heavy")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foldr": "x"}, "foldr"),
        ({"mixtures": 1}, "mixtures"),
        ({"max_experts": 0}, "max_experts"),
        ({"adapters": {"a:b": "x"}}, "adapters"),
        ({"adapters": {"a": ""}}, "adapters"),
        ({"any_path": "yes"}, "any_path"),
        (True, "object"),
    ],
)
def test_wrong_options_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        options_from({"loraplex": given})


def test_without_the_key_the_plugin_is_not_asked_for():
    assert options_from({}) is None
    assert options_from({"gdn_prefill_backend": "x"}) is None
    assert options_from({"loraplex": {}}) == PluginOptions()


def test_a_path_longer_than_a_file_s_is_not_found(root):
    with pytest.raises(AdapterNotFoundError, match="no folder"):
        FolderCatalog(PluginOptions(folder=str(root))).find("/" + "x" * 5000)
