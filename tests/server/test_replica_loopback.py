"""Ray's ports stay on this machine, or nothing starts: what can be tested without Ray."""

import sys
from types import ModuleType

import pytest

from loraplex.errors import ConfigError
from loraplex.server.replicas import loopback


def install(monkeypatch: pytest.MonkeyPatch, **contents) -> ModuleType:
    """A module in the place of Ray Serve's."""
    for name in ("ray", "ray.serve", "ray.serve._private"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("ray.serve._private.replica")
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(loopback, "version", lambda name: "2.99.0")
    return module


def test_the_port_is_bound_to_the_loopback_address(monkeypatch):
    module = install(monkeypatch, add_port_to_grpc_server=lambda server, address: (server, address))
    loopback.check_loopback()
    loopback.bind_replica_to_loopback()
    assert module.add_port_to_grpc_server("server", "[::]:0") == ("server", "127.0.0.1:0")


@pytest.mark.parametrize("contents", [{}, {"add_port_to_grpc_server": None}])
@pytest.mark.parametrize("refuse", [loopback.check_loopback, loopback.bind_replica_to_loopback])
def test_another_ray_is_refused_with_what_can_be_done(monkeypatch, contents, refuse):
    install(monkeypatch, **contents)
    with pytest.raises(ConfigError, match=r"Ray 2.99.0 has moved .*ray\[serve\]>=2.60,<2.61.*--no-replica-loopback"):
        refuse()


def test_a_ray_whose_module_is_gone_is_refused_too(monkeypatch):
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "ray.serve._private.replica", None)
    with pytest.raises(ConfigError, match="has moved"):
        loopback.check_loopback()


def test_the_version_that_is_known_is_the_extras():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]
    assert loopback.KNOWN in project["optional-dependencies"]["ray"]
