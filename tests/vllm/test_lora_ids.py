"""vLLM serves whatever has a `lora_int_id`: the plugin refuses a second adapter that comes with the same one."""

import pytest

from loraplex.errors import RequestError
from tests.vllm.worlds import difference, engine, prompts


def make(name, path, number=7, **more):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path, **more)


def test_number_of_another_adapter_is_refused():
    from loraplex.vllm_plugin.lora_ids import LoraIds

    ids = LoraIds()
    ids.check(make("protein", "protein"))
    ids.check(make("protein", "protein"))
    for name, path in (("materials", "materials"), ("protein", "elsewhere")):
        with pytest.raises(RequestError, match="lora_int_id 7 is that of 'protein'"):
            ids.check(make(name, path))
    with pytest.raises(RequestError):
        ids.check(make("materials", "materials", load_inplace=True))
    ids.check(make("protein", "elsewhere", load_inplace=True))  # vLLM loads it again under its number
    ids.check(make("protein", "elsewhere"))
    ids.check(make("protein", "protein"))  # a request from before
    with pytest.raises(RequestError):
        ids.check(make("materials", "elsewhere"))


def test_only_the_request_with_the_wrong_number_fails(world, register):
    from vllm import SamplingParams

    prompt = prompts(1)[0]
    rows = [("protein", prompt), ("protein:0.7+materials:0.3", prompt), (None, prompt)]
    with engine(world, {}, max_loras=2) as llm:
        params = SamplingParams(max_tokens=1, detokenize=False)
        asked = [{"prompt_token_ids": prompt}]
        llm.generate(asked, params, lora_request=make("materials", "materials", 99), use_tqdm=False)
        with pytest.raises(RequestError, match="lora_int_id 99"):
            llm.generate(asked, params, lora_request=make("protein", "protein", 99), use_tqdm=False)
        found = difference(llm, world, rows, 3)
        assert found.is_none, found
        assert llm.llm_engine.add_lora(make("chemistry", "chemistry", 98))
        with pytest.raises(RequestError, match="lora_int_id 98"):  # loaded beforehand, without a request
            llm.llm_engine.add_lora(make("protein", "protein", 98))
