"""What training ends answers with is what serving stops at, wherever tokenizer, chat template and model disagree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loraplex import Engine, MultiLoraModel, Request, SamplingParams
from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.models.text.end_tokens import TrainingEnds, end_token_ids, training_ends, turn_end
from loraplex.models.text.prompts import generate_texts
from loraplex.training import (
    AdapterJob,
    EvaluationConfig,
    OptimizerConfig,
    StepsConfig,
    TrainConfig,
    train_adapters,
)
from tests.server.tiny_server import character_tokenizer, running, settings
from tests.tiny_models import VOCAB_SIZE, tiny_model
from tests.training.tiny_jobs import CHAT_TEMPLATE, tiny_tokenizer, write_records

END, IM_END = 4, 3  # <unk>, at which the model stops; <|im_end|>, the tokenizer's eos_token and the template's end
ASKED = "hi"
TARGETS = ("q_proj", "v_proj", "down_proj", "lm_head")
FORMS: dict[str, dict[str, Any]] = {
    "completion": {"prompt": ASKED, "completion": "ok"},
    "chat": {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "ok"}]},
}
PROMPTS: dict[str, Any] = {"completion": ASKED, "chat": [{"role": "user", "content": ASKED}]}


def make_model(eos: int | list[int] | None) -> MultiLoraModel:
    base = tiny_model("llama")
    base.generation_config.eos_token_id = eos
    model = MultiLoraModel(base)
    model.__dict__["tokenizer"] = character_tokenizer()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that know one answer, of each form, trained where the model stops at END, or at nothing."""
    root = tmp_path_factory.mktemp("ends")
    for kind, eos in (("other", END), ("none", None)):
        jobs = [
            AdapterJob(
                name=f"{form}-{kind}",
                data=write_records(root / f"{form}.jsonl", [record] * 4),
                lora=LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS),
                steps=StepsConfig(max_steps=40, max_length=128),
                optimizer=OptimizerConfig(learning_rate=3e-2),
                evaluation=EvaluationConfig(eval_fraction=0),
            )
            for form, record in FORMS.items()
        ]
        model = make_model(eos)
        results = train_adapters(model, model.tokenizer, jobs=jobs, config=TrainConfig(output=root / kind, plots=False))
        assert max(result.train_losses[-1] for result in results) < 0.05, "not learnt by heart"
    return root


def loaded(folder: Path, eos: int | list[int] | None, kind: str) -> MultiLoraModel:
    model = make_model(eos)
    for form in FORMS:
        model.load_adapter(form, folder / kind / f"{form}-{kind}")
    return model


cases = pytest.mark.parametrize(("kind", "eos"), [("other", END), ("none", None), ("none", END), ("other", [1, 99])])
forms = pytest.mark.parametrize("form", FORMS)


@cases
@forms
def test_engine_generate_and_texts_stop_after_the_answer(
    folder: Path, form: str, kind: str, eos: int | list[int] | None
) -> None:
    model = loaded(folder, eos, kind)
    with Engine(model) as engine:
        (result,) = engine.generate([Request(PROMPTS[form], adapters=form, sampling=SamplingParams(max_tokens=12))])
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("ok", "stop", 3)
    batch = generate_texts(model, [ASKED], adapters=[form], chat=form == "chat", max_new_tokens=12)
    assert (batch.texts, batch.num_tokens) == (["ok"], [3])
    ids = torch.tensor([tokens_of(model.tokenizer, form)])
    answer = model.generate(ids, torch.ones_like(ids), adapters=[form], do_sample=False, max_new_tokens=12)
    assert answer[0, ids.shape[1] :].tolist() == list(result.token_ids)


def tokens_of(tokenizer: Any, form: str) -> list[int]:
    text = PROMPTS[form]
    if form == "chat":
        text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@forms
def test_the_server_stops_after_the_answer(folder: Path, form: str) -> None:
    with running(loaded(folder, END, "other"), settings()) as server:
        client = server.client()
        if form == "chat":
            chat = client.chat.completions.create(model=form, messages=PROMPTS[form], max_tokens=12, temperature=0)
            text, reason = chat.choices[0].message.content, chat.choices[0].finish_reason
        else:
            plain = client.completions.create(model=form, prompt=PROMPTS[form], max_tokens=12, temperature=0)
            text, reason = plain.choices[0].text, plain.choices[0].finish_reason
    assert (text, reason) == ("ok", "stop")


def test_a_completion_ends_with_what_transformers_stops_at_too(folder: Path) -> None:
    model = loaded(folder, END, "other")
    ids = torch.tensor([tokens_of(model.tokenizer, "completion")])
    base = tiny_model("llama")
    base.generation_config.eos_token_id = END
    of_peft = peft.PeftModel.from_pretrained(base, folder / "other" / "completion-other")
    answer = of_peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert answer[0, ids.shape[1] :].tolist()[2:] == [END]


def test_rows_without_the_adapter_go_on(folder: Path) -> None:
    """In `generate` only rows of the adapter stop at its tokens; each row is what it is alone."""
    model = loaded(folder, None, "none")
    prompts = [tokens_of(model.tokenizer, "completion")] * 2
    ids = torch.tensor(prompts)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
    base = model.base.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
    both = model.generate(ids, torch.ones_like(ids), adapters=["completion", None], **options)
    assert torch.equal(both[1], base[0])
    assert both[0, 2:].tolist()[2:] == [IM_END] + [0] * 37
    ends = model.registry.end_tokens([(("completion", 1.0),), (), (("chat", 0.5), ("completion", 0.5))])
    assert ends == [(IM_END,), (), (IM_END,)]
    beams = model.generate(ids, torch.ones_like(ids), adapters=["completion", None], num_beams=3, **options)
    assert beams[0, 2:].tolist()[2] == IM_END


def test_a_calls_own_end_tokens_count_alone(folder: Path) -> None:
    model = loaded(folder, None, "none")
    ids = torch.tensor([tokens_of(model.tokenizer, "completion")])
    answer = model.generate(ids, adapters=["completion"], eos_token_id=None, do_sample=False, max_new_tokens=9)
    assert answer.shape[1] == ids.shape[1] + 9
    request = Request(ASKED, adapters="completion", sampling=SamplingParams(max_tokens=9, ignore_eos=True))
    with Engine(model) as engine:
        assert engine.generate([request])[0].finish_reason == "length"


def test_the_folder_says_what_ends_an_answer_and_peft_does_not_mind(folder: Path, tmp_path: Path) -> None:
    place = folder / "other" / "completion-other"
    assert json.loads((place / "loraplex.json").read_text()) == {"format_version": 1, "end_tokens": [IM_END, END]}
    adapter = read_adapter(place)
    assert adapter.end_tokens == (IM_END, END)
    write_adapter(adapter, tmp_path / "again")
    assert (tmp_path / "again" / "loraplex.json").read_bytes() == (place / "loraplex.json").read_bytes()
    write_adapter(adapter, tmp_path / "again", overwrite=True)
    base = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    expected = MultiLoraModel(base)
    expected.load_adapter("a", place)
    actual = peft.PeftModel.from_pretrained(tiny_model("llama"), place)
    torch.testing.assert_close(actual(ids).logits, expected(ids, adapters=["a"]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[" * 100_000, AdapterFormatError),
        ("[]", AdapterFormatError),
        ('{"format_version": 2, "end_tokens": []}', UnsupportedAdapterError),
        ('{"format_version": 1, "end_tokens": [], "more": 1}', UnsupportedAdapterError),
        ('{"format_version": 1, "end_tokens": [-1]}', AdapterFormatError),
        ('{"format_version": 1, "end_tokens": [true]}', AdapterFormatError),
        ('{"format_version": 1, "end_tokens": 3}', AdapterFormatError),
    ],
)
def test_a_damaged_record_is_refused(folder: Path, tmp_path: Path, text: str, error: type[Exception]) -> None:
    write_adapter(read_adapter(folder / "none" / "chat-none"), tmp_path / "a")
    (tmp_path / "a" / "loraplex.json").write_text(text)
    with pytest.raises(error, match=r"loraplex\.json"):
        read_adapter(tmp_path / "a")


def test_end_tokens_that_the_model_does_not_have_are_ignored(folder: Path, tmp_path: Path) -> None:
    write_adapter(read_adapter(folder / "none" / "completion-none"), tmp_path / "a")
    record = {"format_version": 1, "end_tokens": [IM_END, VOCAB_SIZE + 7]}
    (tmp_path / "a" / "loraplex.json").write_text(json.dumps(record))
    model = make_model(END)
    model.load_adapter("a", tmp_path / "a")
    sampling = SamplingParams(max_tokens=12, min_tokens=1)  # for which end tokens are ruled out at first
    with Engine(model) as engine:
        assert engine.generate([Request(ASKED, adapters="a", sampling=sampling)])[0].text == "ok"


TEMPLATES = {
    CHAT_TEMPLATE: "<|im_end|>",
    CHAT_TEMPLATE.replace("<|im_end|>", ""): None,
    CHAT_TEMPLATE.replace("<|im_end|>\n", "<unk>"): "<unk>",
    CHAT_TEMPLATE.replace("<|im_end|>", " <pad> <bos>"): "<pad>",
    "{{ raise_exception('no') }}": None,
    "a constant": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_templates_end_of_turn_is_the_special_token_after_the_answer(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    found = turn_end(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == TEMPLATES[template]


def without_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("eos", "make_tokenizer", "stops", "trained", "warnings"),
    [
        (IM_END, tiny_tokenizer, (IM_END,), TrainingEnds(plain=IM_END, turn=IM_END), 0),
        ([7, IM_END], tiny_tokenizer, (7, IM_END), TrainingEnds(plain=IM_END, turn=IM_END), 0),
        (None, tiny_tokenizer, (IM_END,), TrainingEnds(plain=IM_END, turn=IM_END), 1),
        ([END, 7], tiny_tokenizer, (END, 7, IM_END), TrainingEnds(plain=END, turn=IM_END), 2),
        (END, lambda: tiny_tokenizer(None), (END, IM_END), TrainingEnds(plain=END, turn=None), 1),
        (None, lambda: without_eos(tiny_tokenizer(None)), (), TrainingEnds(plain=None, turn=None), 1),
        (None, lambda: without_eos(tiny_tokenizer()), (IM_END,), TrainingEnds(plain=IM_END, turn=IM_END), 1),
        (VOCAB_SIZE, tiny_tokenizer, (IM_END,), TrainingEnds(plain=IM_END, turn=IM_END), 1),
    ],
)
def test_one_rule_for_training_and_serving(
    eos: Any,
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
    stops: tuple[int, ...],
    trained: TrainingEnds,
    warnings: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, tokenizer = make_model(eos).base, make_tokenizer()
    assert end_token_ids(base, tokenizer) == stops
    assert training_ends(base, tokenizer) == trained
    assert set(trained.all) <= set(stops)
    assert len(caplog.records) == warnings
