"""Prompts in, answers out: encoding, padding, decoding, and the first token's logits."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraplex import MultiLoraModel
from loraplex.errors import BatchError, LinkSyntaxError, RequestError
from loraplex.models.text.prompts import TextBatch, decode_batch, encode_prompts, first_token_logits, generate_texts
from tests.parity.oracle import assert_close
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model

PAD, BOS, EOS, OTHER_END = 0, 1, 2, 3
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} says {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant says{% endif %}"
)


def word_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    """One token a word: <pad> <s> </s> <end>, then user, says, assistant, then w7, w8 and so on."""
    words = ["<pad>", "<s>", "</s>", "<end>", "user", "says", "assistant"]
    words += [f"w{i}" for i in range(len(words), VOCAB_SIZE)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **options)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory) -> MultiLoraModel:
    base = tiny_model(request.param)
    model = MultiLoraModel(base)
    model.tokenizer = word_tokenizer()
    for seed, name in enumerate(["a", "b"]):
        folder = tmp_path_factory.mktemp("adapters") / name
        targets = linear_targets(request.param)
        model.load_adapter(name, random_peft_adapter(base, folder, targets=targets, seed=seed))
    return model


def test_chat_prompts_become_turns_and_shorter_ones_are_padded_on_the_left():
    encoded = encode_prompts(word_tokenizer(), ["w9 w8 w7", "w7"])
    assert encoded["input_ids"].tolist() == [[4, 5, 9, 8, 7, 6, 5], [PAD, PAD, 4, 5, 7, 6, 5]]
    assert encoded["attention_mask"].tolist() == [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]


def test_raw_prompts_are_taken_as_they_are():
    encoded = encode_prompts(word_tokenizer(), ["w9 w8", "w7"], chat=False)
    assert encoded["input_ids"].tolist() == [[9, 8], [PAD, 7]]
    assert encoded["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_chat_template_alone_says_which_special_tokens_a_chat_starts_with(smollm2):
    from loraplex.models.checkpoints.loading import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    (ids,) = encode_prompts(tokenizer, ["Hi"])["input_ids"].tolist()
    turn = [{"role": "user", "content": "Hi"}]
    assert ids == tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(("eos", "padding"), [("</s>", EOS), (None, PAD)])
def test_tokenizer_without_a_padding_token_pads_with_its_end_or_any_other(eos, padding):
    tokenizer = word_tokenizer(pad_token=None, eos_token=eos)
    encoded = encode_prompts(tokenizer, ["w9 w8", "w7"], chat=False)
    assert encoded["input_ids"].tolist() == [[9, 8], [padding, 7]]
    assert encoded["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_tokenizer_without_chat_template_is_refused_with_the_way_out():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match=r"no chat template.*chat=False.*--raw"):
        encode_prompts(tokenizer, ["w7"])
    assert encode_prompts(tokenizer, ["w7"], chat=False)["input_ids"].tolist() == [[7]]


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no such role') }}", "{{ 1 // 0 }}", "{{ messages[9].role }}"]
)
def test_messages_that_the_chat_template_fails_on_are_refused(template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match="the chat template refuses these messages"):
        encode_prompts(tokenizer, ["w7"])


@pytest.mark.parametrize("chat", [True, False])
def test_half_of_a_surrogate_pair_is_refused(chat):
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        encode_prompts(word_tokenizer(), ["w7", "w8 \ud800"], chat=chat)


def test_empty_batch_is_refused(model):
    with pytest.raises(BatchError, match="no prompts"):
        encode_prompts(word_tokenizer(), [])
    with pytest.raises(BatchError, match="no prompts"):
        generate_texts(model, [])


def test_answers_end_at_their_first_end_token():
    new_tokens = torch.tensor(
        [[7, 8, EOS, 9, EOS], [EOS, PAD, PAD, PAD, PAD], [7, 8, 9, 10, 11], [7, OTHER_END, 8, 9, 9]]
    )
    batch = decode_batch(word_tokenizer(), new_tokens, 2.0)
    assert batch.texts == ["w7 w8", "", "w7 w8 w9 w10 w11", "w7 <end> w8 w9 w9"]
    assert batch.num_tokens == [3, 1, 5, 5]
    assert batch.tokens_per_s == 7
    assert decode_batch(word_tokenizer(), new_tokens, 2.0, end_tokens=[OTHER_END]).num_tokens == [3, 1, 5, 2]


def test_answers_of_a_tokenizer_without_end_token_are_taken_whole():
    batch = decode_batch(word_tokenizer(eos_token=None), torch.tensor([[7, 8, EOS]]), 1.0)
    assert batch.num_tokens == [3]


def test_batch_of_prompts_is_answered_each_by_its_own_adapters(model):
    prompts = ["w20 w21 w22 w23", "w30", "w40 w41", "w50 w51 w52 w53 w54 w55"]
    adapters = [None, "a", "b:0.5+a", "b"]
    together = generate_texts(model, prompts, adapters=adapters, max_new_tokens=8)
    assert isinstance(together, TextBatch)
    for i, prompt in enumerate(prompts):
        alone = generate_texts(model, [prompt], adapters=[adapters[i]], max_new_tokens=8)
        assert (together.texts[i], together.num_tokens[i]) == (alone.texts[0], alone.num_tokens[0])
    assert together.texts != generate_texts(model, prompts, max_new_tokens=8).texts


@pytest.mark.parametrize("of_the_model", [True, False], ids=["the model's", "the call's"])
def test_any_end_token_of_the_generation_ends_an_answer(model, monkeypatch, of_the_model):
    """Some chat models stop at several tokens, of which the tokenizer knows one; after them comes padding."""
    whole = generate_texts(model, ["w20"], chat=False, adapters=["a"], max_new_tokens=8)
    third = word_tokenizer().convert_tokens_to_ids(whole.texts[0].split()[2])
    options = {} if of_the_model else {"eos_token_id": [EOS, third]}
    if of_the_model:
        monkeypatch.setattr(model.base.generation_config, "eos_token_id", [EOS, third])
    batch = generate_texts(model, ["w20", "w30"], chat=False, adapters=["a", None], max_new_tokens=8, **options)
    first_occurrence = whole.texts[0].split().index(f"w{third}") + 1
    assert batch.num_tokens[0] == first_occurrence
    assert batch.texts[0] == " ".join(whole.texts[0].split()[:first_occurrence])


def test_malformed_link_is_refused(model):
    with pytest.raises(LinkSyntaxError, match="'a:'"):
        generate_texts(model, ["w7"], adapters=["a:"])


def test_sampling_options_reach_the_generation(model):
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 8}
    assert generate_texts(model, ["w7"], **options).texts != generate_texts(model, ["w7"], **options).texts


def test_first_token_logits_equal_the_first_step_of_the_generation(model):
    prompts = ["w20 w21 w22 w23", "w30", "w40 w41"]
    adapters = ["a", None, "b:0.5+a"]
    encoded = encode_prompts(model.tokenizer, prompts)
    out = model.generate(
        encoded["input_ids"],
        encoded["attention_mask"],
        adapters=adapters,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = first_token_logits(model, prompts, adapters=adapters)
    assert logits.shape == (3, VOCAB_SIZE)
    assert_close(logits, out.logits[0], "first token")
    assert not torch.allclose(logits, first_token_logits(model, prompts), atol=1e-2)


def test_model_encodes_chats_for_its_own_calls(model):
    prompts = ["w9", [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]]
    inputs = model.encode_chat(prompts)
    expected = encode_prompts(model.tokenizer, prompts)
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert inputs["attention_mask"][0, 0] == 0  # padded on the left
    assert model(**inputs, adapters=["a", None]).logits.shape[:2] == inputs["input_ids"].shape
    with pytest.raises(BatchError, match="no prompts"):
        model.encode_chat([])
