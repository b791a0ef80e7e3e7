"""`loraplex serve --engine vllm`: the command line that it writes, and what it refuses."""

import importlib.util
import json
from unittest import mock

import pytest

from loraplex.cli import serve_vllm
from loraplex.cli.app import cli
from loraplex.cli.serve_vllm import rank_for, vllm_arguments
from loraplex.errors import ConfigError
from loraplex.server.settings import AccessSettings, ModelSettings, NetworkSettings, ServeConfig
from tests.xlora.mixtures import XLoraConfig, write_mixture

ADAPTER = "examples/adapters/protein"


def option(arguments, flag):
    return arguments[arguments.index(flag) + 1]


def test_settings_become_vllms_flags(tmp_path):
    mixture = write_mixture(tmp_path / "science", "peft", XLoraConfig())
    model = ModelSettings(model="some/model", adapters={"protein": ADAPTER}, mixtures={"science": str(mixture)})
    settings = ServeConfig(model=model, network=NetworkSettings(port=9000))
    arguments = vllm_arguments(settings, "--tensor-parallel-size 2")
    assert option(arguments, "--model") == "some/model"
    assert option(arguments, "--port") == "9000"
    assert option(arguments, "--host") == "127.0.0.1"
    assert option(arguments, "--max-lora-rank") == "16"  # of protein; the mixture's experts have 2 + 3 + 4
    assert arguments[-2:] == ["--tensor-parallel-size", "2"]
    options = json.loads(option(arguments, "--additional-config"))["loraplex"]
    assert options == {"adapters": {"protein": ADAPTER, "science": str(mixture)}, "mixtures": True, "routers": False}


def test_watched_folder_is_the_folder_of_names(tmp_path):
    write_mixture(tmp_path / "team" / "science", "xlora", XLoraConfig())
    arguments = vllm_arguments(ServeConfig(model=ModelSettings(model="m", watch=str(tmp_path))))
    options = json.loads(option(arguments, "--additional-config"))["loraplex"]
    assert options == {"adapters": {}, "mixtures": True, "routers": False, "folder": str(tmp_path)}
    assert option(arguments, "--max-lora-rank") == "16"


@pytest.mark.parametrize("kind", ["arrow", "linear"])
def test_mixtures_with_routers_turn_their_option_on(kind, tmp_path):
    from loraplex import ArrowConfig, LinearRouterConfig, MultiLoraModel
    from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

    model = MultiLoraModel(tiny_model("llama"))
    for name in "ab":
        folder = random_peft_adapter(model.base, tmp_path / "apart" / name, targets=linear_targets("llama"), r=8)
        model.load_adapter(name, folder)
    model.create_mixture("m", "ab", ArrowConfig() if kind == "arrow" else LinearRouterConfig())
    model.save_mixture("m", tmp_path / "watched" / "m")
    watched = str(tmp_path / "watched")
    arguments = vllm_arguments(ServeConfig(model=ModelSettings(model="m", watch=watched)))
    options = json.loads(option(arguments, "--additional-config"))["loraplex"]
    assert options == {"adapters": {}, "mixtures": False, "routers": True, "folder": watched}
    assert option(arguments, "--max-lora-rank") == ("16" if kind == "arrow" else "32")  # and a rank for each logit


def test_residuals_turn_their_options_on(tmp_path):
    from loraplex.residual import write_control_vector, write_residual
    from loraplex.residual.layers import AttentionLayers
    from tests.residual.tiny_interventions import random_block_vector
    from tests.residual.tiny_residuals import random_linked
    from tests.tiny_models import tiny_model

    base = tiny_model("llama")
    write_control_vector(random_block_vector(base, 1, at=(1,)), tmp_path / "calm.gguf", model_type="llama")
    for linked in (0, 1):
        if linked:
            write_residual(random_linked(AttentionLayers(base), 2), tmp_path / "team" / "listening")
        arguments = vllm_arguments(ServeConfig(model=ModelSettings(model="m", watch=str(tmp_path))))
        options = json.loads(option(arguments, "--additional-config"))["loraplex"]
        assert (options["residuals"], options["linked"]) == (True, linked)
        assert "--enforce-eager" in arguments
        assert option(arguments, "--max-lora-rank") == "8"


def test_options_in_vllms_own_arguments_are_put_over_those_that_were_found():
    settings = ServeConfig(model=ModelSettings(model="m", adapters={"protein": ADAPTER}))
    given = {"loraplex": {"attention": True, "routers": True}, "other": 1}
    arguments = vllm_arguments(settings, f"--seed 3 --additional-config '{json.dumps(given)}' --max-num-seqs 4")
    assert arguments.count("--additional-config") == 1
    found = json.loads(option(arguments, "--additional-config"))
    options = {"adapters": {"protein": ADAPTER}, "mixtures": False, "routers": True, "attention": True}
    assert found == {"loraplex": options, "other": 1}
    assert arguments[-4:] == ["--seed", "3", "--max-num-seqs", "4"]
    assert "--enforce-eager" in arguments
    for wrong in ("", "[1]", "{", '{"loraplex": 3}'):
        with pytest.raises(ConfigError, match="additional-config"):
            vllm_arguments(settings, f"--additional-config '{wrong}'")


def test_ranks_are_those_that_vllm_knows(tmp_path):
    assert rank_for([]) == 8
    with mock.patch.object(serve_vllm, "_rank", return_value=65):
        assert rank_for([tmp_path]) == 128
    with mock.patch.object(serve_vllm, "_rank", return_value=513), pytest.raises(ConfigError, match="513"):
        rank_for([tmp_path])


def test_settings_without_a_counterpart_are_refused_by_name(tmp_path):
    (tmp_path / "keys.json").touch()
    settings = ServeConfig(access=AccessSettings(keys_file=str(tmp_path / "keys.json")))
    with pytest.raises(ConfigError, match=r"access\.keys_file"):
        vllm_arguments(settings)


def test_vllm_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"loraplex\[vllm\]"):
        cli(["serve", "--engine", "vllm"], standalone_mode=False)


def test_flags_for_vllm_want_vllm():
    with pytest.raises(ConfigError, match="--engine vllm"):
        cli(["serve", "--vllm-args", "--seed 1"], standalone_mode=False)
    with pytest.raises(ConfigError, match="replicas"):
        cli(["serve", "--engine", "vllm", "--replicas", "2"], standalone_mode=False)
