"""/generate and /generate_stream: TGI's and LoRAX's shapes, read by TGI's client, with the answers of OpenAI's API."""

import json

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from loraplex.server.api.tgi.bodies import model_of
from tests.server.tiny_server import Running

INPUTS = "The protein"


def generate(server: Running, **parameters):
    return server.http().post("/generate", json={"inputs": INPUTS, "parameters": parameters})


def completion(server: Running, **fields):
    body = {"model": "tiny", "prompt": INPUTS, "max_tokens": 6, "temperature": 0, "return_token_ids": True} | fields
    return server.http().post("/v1/completions", json=body).json()["choices"][0]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client reach the server on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("parameters", "model"),
    [
        ({}, "tiny"),
        ({"adapter_id": "a"}, "a"),
        ({"adapter_id": "a:0.5+b"}, "a:0.5+b"),
        ({"merged_adapters": {"ids": ["a", "b"], "weights": [0.5, 0.25], "merge_strategy": "linear"}}, "a:0.5+b:0.25"),
        ({"adapters": {"ids": ["a", "mix-ab"]}}, "a+mix-ab"),
    ],
)
def test_answers_are_those_of_the_same_model_in_openais_api(server, parameters, model):
    told = generate(server, max_new_tokens=6, details=True, **parameters).json()
    expected = completion(server, model=model, logprobs=0)
    assert told["generated_text"] == expected["text"]
    details = told["details"]
    assert [token["id"] for token in details["tokens"]] == expected["token_ids"]
    assert [token["text"] for token in details["tokens"]] == expected["logprobs"]["tokens"]
    assert [token["logprob"] for token in details["tokens"]] == expected["logprobs"]["token_logprobs"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 6)
    assert details["prompt_tokens"] == len(INPUTS)
    assert details["prefill"] == []


def test_tgis_client_reads_answers_and_streams(server):
    client = InferenceClient(server.url)
    options = {"max_new_tokens": 6, "details": True, "top_n_tokens": 2, "decoder_input_details": True}
    answer = client.text_generation(INPUTS, **options)
    assert answer.details.finish_reason == "length"
    assert [token.id for token in answer.details.tokens] == completion(server)["token_ids"]
    assert [len(top) for top in answer.details.top_tokens] == [2] * 6
    assert len(answer.details.prefill) == len(INPUTS)
    events = list(client.text_generation(INPUTS, max_new_tokens=6, details=True, stream=True))
    assert [event.token.id for event in events] == [token.id for token in answer.details.tokens]
    assert events[-1].generated_text == answer.generated_text
    assert (events[-1].details.finish_reason, events[-1].details.generated_tokens) == ("length", 6)
    assert all(event.generated_text is None for event in events[:-1])
    assert client.text_generation(INPUTS, max_new_tokens=6) == answer.generated_text


def test_the_root_gives_a_list_as_both_servers_do(server):
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 4}}
    (told,) = server.http().post("/", json=body).json()
    assert told == server.http().post("/generate", json=body).json()


def test_tgis_client_reads_refusals(server):
    with pytest.raises(ValidationError, match="seed"):
        InferenceClient(server.url).text_generation(INPUTS, seed=-5)


def test_a_stream_has_one_event_for_each_token_and_no_other_end(server):
    body = {"inputs": INPUTS, "parameters": {"max_new_tokens": 8, "adapter_id": "a", "return_k_alternatives": 3}}
    for path, fields in (("/generate_stream", {}), ("/generate", {"stream": True})):
        text = server.http().post(path, json=body | fields).text
        events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
        assert len(events) == 8
        assert [event["index"] for event in events] == list(range(1, 9))
        assert {len(event["token"]["alternative_tokens"]) for event in events} == {3}
        assert events[-1]["details"]["prompt_tokens"] == len(INPUTS)


def test_stop_sequences_full_texts_and_truncation(server):
    whole = generate(server, max_new_tokens=30).json()["generated_text"]
    stop = whole[2:4]
    told = generate(server, max_new_tokens=30, stop=[stop], details=True, return_full_text=True).json()
    assert told["generated_text"] == INPUTS + whole[: whole.index(stop) + len(stop)]
    assert told["details"]["finish_reason"] == "stop_sequence"
    cut = generate(server, max_new_tokens=3, truncate=4, details=True, decoder_input_details=True).json()
    assert "".join(token["text"] for token in cut["details"]["prefill"]) == INPUTS[-4:]


def test_sampling_is_off_without_a_sign_of_it_and_on_with_one(server):
    greedy = completion(server)["text"]
    assert generate(server, max_new_tokens=6).json()["generated_text"] == greedy
    for sign in ({"do_sample": True}, {"temperature": 1.0}, {"top_k": 100}, {"top_p": 0.99}):
        texts = {generate(server, max_new_tokens=6, seed=seed, **sign).json()["generated_text"] for seed in range(4)}
        assert len(texts) > 1, sign
    told = generate(server, max_new_tokens=6, do_sample=True, details=True).json()
    again = generate(server, max_new_tokens=6, do_sample=True, seed=told["details"]["seed"]).json()
    assert again["generated_text"] == told["generated_text"]


def test_best_of_tells_the_other_answers(server):
    told = generate(server, max_new_tokens=5, best_of=4, temperature=1.5, seed=3, details=True).json()
    rows = [told["details"], *told["details"]["best_of_sequences"]]
    means = [sum(token["logprob"] for token in row["tokens"]) / 5 for row in rows]
    assert len(rows) == 4
    assert means[0] == max(means)


def test_chats_go_through_the_template(server):
    told = generate(server, max_new_tokens=5, apply_chat_template=True, adapter_id="a", details=True).json()
    messages = [{"role": "user", "content": INPUTS}]
    body = {"model": "a", "messages": messages, "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    chat = server.http().post("/v1/chat/completions", json=body).json()
    assert [token["id"] for token in told["details"]["tokens"]] == chat["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"adapter_source": "s3"}, "adapter_source"),
        ({"merged_adapters": {"ids": ["a"], "merge_strategy": "ties"}}, "merge_strategy"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1, 2]}}, "weights"),
        ({"merged_adapters": {"ids": ["a"]}, "adapter_id": "b"}, "adapter_id"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"temperature": -1}, "temperature"),
        ({"best_of": 2, "apply_chat_template": True}, "best_of"),
        ({"grammar": {"type": "regex", "value": {}}}, "regex"),
    ],
)
def test_refusals_have_tgis_shape(server, parameters, told):
    answer = generate(server, **parameters)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"
    assert told in answer.json()["error"]


def test_unknown_adapters_and_wrong_media_have_tgis_shape(server):
    assert generate(server, adapter_id="unknown").status_code == 404
    assert "unknown" in generate(server, adapter_id="unknown").json()["error"]
    answer = server.http().post("/generate", content=b"{}")
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")


def test_null_parameters_are_none(server):
    plain = generate(server, max_new_tokens=4).json()
    nulls = dict.fromkeys(("adapter_id", "best_of", "seed", "typical_p", "watermark", "stop", "grammar", "whatever"))
    assert generate(server, max_new_tokens=4, **nulls).json() == plain


def test_info_tells_the_model_and_its_limits(server):
    told = server.http().get("/info").json()
    assert (told["model_id"], told["model_dtype"], told["model_device_type"]) == (
        "smollm2-135m",
        "torch.float32",
        "cpu",
    )
    assert (told["max_total_tokens"], told["max_input_length"]) == (256, 255)


def test_a_replicas_front_finds_the_adapters():
    assert model_of({"adapter_id": "a"}) == "a"
    assert model_of({"merged_adapters": {"ids": ["a", "b"], "weights": [0.5, 2]}}) == "a:0.5+b:2"
    assert model_of("nonsense") == ""
    assert model_of({"merged_adapters": ["a"]}) == ""
