import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loraplex.adapters.peft.hub import resolve_adapter_folder
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import AdapterFormatError, AdapterNotFoundError, UnsupportedAdapterError
from tests.adapters.folders import write_folder

Download = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the hub: owner/name below it are repositories."""
    root = tmp_path / "hub"

    def download(repository: str, *, cache_dir: Any, allow_patterns: list[str], revision: str | None) -> str:
        target = Path(cache_dir) / repository / (revision or "main")
        target.mkdir(parents=True)
        for file in (root / repository).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return root


def test_local_folder_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "owner" / "adapter")
    assert resolve_adapter_folder(folder) == folder
    assert resolve_adapter_folder(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter_folder("owner/adapter") == Path("owner/adapter")  # before any look at the hub


def test_hub_id_is_downloaded_without_pickle_files(hub: Path, tmp_path: Path) -> None:
    write_folder(hub / "owner" / "adapter")
    (hub / "owner" / "adapter" / "optimizer.pt").write_bytes(b"pickle")
    folder = resolve_adapter_folder("owner/adapter", revision="v2", cache_dir=tmp_path / "cache")
    assert folder == tmp_path / "cache" / "owner" / "adapter" / "v2"
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len(read_adapter(folder).layers) == 2


def test_repository_with_pickled_weights_only_is_refused(hub: Path, tmp_path: Path) -> None:
    folder = write_folder(hub / "owner" / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match=r"'owner/adapter'.*adapter_model\.safetensors.*pickle"):
        resolve_adapter_folder("owner/adapter", cache_dir=tmp_path / "cache")


def test_shards_are_downloaded(hub: Path, tmp_path: Path) -> None:
    folder = write_folder(hub / "owner" / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model-00001-of-00001.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text("{}")
    found = resolve_adapter_folder("owner/adapter", cache_dir=tmp_path / "cache")
    assert len(list(found.iterdir())) == 3


def test_repository_with_a_mixture_is_refused_with_the_call_that_loads_it(hub: Path, tmp_path: Path) -> None:
    (hub / "owner" / "mixture").mkdir(parents=True)
    (hub / "owner" / "mixture" / "xlora_config.json").write_text("{}")
    with pytest.raises(UnsupportedAdapterError, match="load_mixture"):
        resolve_adapter_folder("owner/mixture", cache_dir=tmp_path / "cache")


def test_repository_without_configuration_is_refused(hub: Path, tmp_path: Path) -> None:
    (write_folder(hub / "owner" / "model") / "adapter_config.json").unlink()
    with pytest.raises(AdapterFormatError, match=r"'owner/model'.*adapter_config\.json"):
        resolve_adapter_folder("owner/model", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("path", ["./missing", "/missing/adapter", "~/missing", "missing", "a/b/c", Path("a/b")])
def test_missing_folder_that_cannot_be_a_hub_id_never_reaches_the_hub(
    path: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(AdapterNotFoundError) as caught:
        resolve_adapter_folder(path)
    assert repr(str(path)) in str(caught.value)


def test_offline_without_a_cached_copy_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:  # the tests run with HF_HUB_OFFLINE
        resolve_adapter_folder("owner/adapter", revision="v2", cache_dir=tmp_path)
    message = str(caught.value)
    assert all(word in message for word in ("'owner/adapter'", "'v2'", "HF_HUB_OFFLINE", "local folder"))


def test_invalid_hub_id_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="no valid hub id"):
        resolve_adapter_folder("-owner/adapter$", cache_dir=tmp_path)


def hub_error(error: type[Exception]) -> Exception:
    """One of the hub's errors without the response that its constructor wants, of whatever HTTP library."""
    return error.__new__(error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(RepositoryNotFoundError), r"not on the hub.*private, log in \(hf auth login\), or set HF_TOKEN"),
        (hub_error(GatedRepoError), "has to grant access.*HF_TOKEN"),
        (LocalTokenNotFoundError("no token"), "asks for a token.*HF_TOKEN"),
        (hub_error(RevisionNotFoundError), "no revision 'v2'"),
        (ConnectionError("unplugged"), "download from the hub at revision 'v2' failed: unplugged"),
        (OSError("no space left on device"), "no space left on device"),
    ],
)
def test_failure_of_the_hub_is_typed_and_clear(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(AdapterNotFoundError, match=message):
        resolve_adapter_folder("owner/adapter", revision="v2")
