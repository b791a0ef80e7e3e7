"""Answers inside vLLM end where their adapters' loraplex.json says, as they do in loraplex's own engine."""

import shutil

import pytest

from loraplex.adapters.peft.record import write_record
from loraplex.xlora.formats.folders import read_mixture_folder
from tests.vllm.worlds import engine, lora_request, prompts

NUM_TOKENS = 8


@pytest.fixture
def ending(world, tmp_path):
    """A copy of "protein" whose answers end with the third token of one, and that answer."""
    answer = world.expected("protein", prompts(1)[0], NUM_TOKENS).tokens
    end = next(token for token in answer[1:] if token != answer[0])
    folder = shutil.copytree(world.adapters["protein"], tmp_path / "ending")
    write_record(folder, (end,))
    return folder, answer, end


def test_an_adapter_ends_its_own_answers_only(world, register, ending):
    from vllm import SamplingParams

    folder, answer, end = ending
    cut = answer[: answer.index(end) + 1]
    rows = ["ending", "ending:0.9999999+materials:0", "protein", None]
    asked = [{"prompt_token_ids": prompts(1)[0]}] * len(rows)
    with engine(world, {"adapters": {"ending": str(folder)}}) as llm:
        for options, expected in (({}, cut), ({"ignore_eos": True}, answer), ({"min_tokens": NUM_TOKENS}, None)):
            params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, detokenize=False, **options)
            outputs = llm.generate(asked, params, lora_request=[lora_request(row, {}) for row in rows], use_tqdm=False)
            ended, linked, plain, base = (list(output.outputs[0].token_ids) for output in outputs)
            assert params.stop_token_ids == [], "the caller's own options are shared by all rows"
            assert plain == answer
            assert len(base) == NUM_TOKENS
            if expected is None:
                assert len(ended) == NUM_TOKENS
                assert end not in ended, "an end token that min_tokens holds back"
            else:
                assert ended == linked == expected


def test_a_mixture_ends_where_one_of_its_experts_does(world, tmp_path):
    from loraplex.vllm_plugin.catalog import FolderCatalog
    from loraplex.vllm_plugin.end_tokens import AdapterEnds
    from loraplex.vllm_plugin.options import PluginOptions

    named = shutil.copytree(world.named, tmp_path / "named")
    for number, expert in enumerate(read_mixture_folder(named / "mix0").experts.values()):
        assert expert.is_relative_to(named)
        write_record(expert, (5 + number, 40))
    write_record(named / "protein", (9,))
    ends = AdapterEnds(FolderCatalog(PluginOptions(folder=str(named))))
    assert ends.of(lora_request("mix0", {})) == (5, 40, 6, 7)
    assert ends.of(lora_request("protein+mix0:0.5", {})) == (9, 5, 40, 6, 7)
    assert ends.of(lora_request("materials", {})) == ()
    assert ends.of(lora_request("nothing", {})) == (), "where its weights are read, the request is refused"
    (named / "protein" / "loraplex.json").write_text("{")
    assert ends.of(lora_request("protein:0.25", {})) == ()
