"""`import loraplex` is light, and its names are those of its modules."""

import subprocess
import sys

import pytest

import loraplex


@pytest.mark.parametrize("name", loraplex.__all__)
def test_public_name_is_its_modules_own(name: str) -> None:
    thing = getattr(loraplex, name)
    assert thing.__name__ == name
    assert thing.__module__ == loraplex._MODULES[name]
    assert name in dir(loraplex)


def test_every_lazy_name_is_public() -> None:
    assert sorted(loraplex._MODULES) == loraplex.__all__


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="Engin'"):
        _ = loraplex.Engin
    with pytest.raises(ImportError):
        from loraplex import Engin  # noqa: F401


@pytest.mark.parametrize("module", ["loraplex", "loraplex.vllm_plugin.register", "loraplex.vllm_plugin.options"])
def test_import_brings_in_no_model_library(module: str) -> None:
    """What vLLM imports in each of its processes, whether the plugin is asked for or not."""
    program = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_serving_and_answering_bring_in_no_package_that_only_training_needs() -> None:
    """transformers' schedulers bring PEFT along, and that bitsandbytes: seconds, and a message about its kernels."""
    program = (
        "import sys, loraplex.cli.demo, loraplex.cli.generate, loraplex.engine.engine, loraplex.models.multi_lora;"
        "print(sorted({'peft', 'bitsandbytes'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", result.stdout
    assert not result.stderr
