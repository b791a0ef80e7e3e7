"""Images in packed passes: each request gets what PEFT gives it alone, whatever is beside it."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    LlavaProcessor,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.frontend.image_inputs import decode_images
from loraplex.engine.kv.kv_cache import LayerShape
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.worker.images import ImageEncoder
from loraplex.errors import RequestError, TooLargeError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.xlora.config import XLoraConfig
from tests.models.test_images import CHOICES, IMAGE, TOKENS, alone, inputs_of, make, pixels_of
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import tiny_tokenizer

MODELS = (
    *("llava", "smolvlm", "qwen2_5_vl", "qwen3_vl"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral3", "qwen3_5", "idefics3", "qwen2_vl")),
)
NUM_NEW = 6

Case = tuple[str, MultiLoraModel, Any]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, folder = request.param, tmp_path_factory.mktemp("images")
    for seed, adapter in enumerate("ab"):
        random_peft_adapter(make(name), folder / adapter, targets="all-linear", seed=seed, lora_alpha=2)
    model = MultiLoraModel(make(name))
    oracle = peft.PeftModel.from_pretrained(make(name), str(folder / "a"), "a")
    oracle.load_adapter(str(folder / "b"), "b")
    oracle.add_weighted_adapter(["a", "b"], [1.0, 0.5], "link", combination_type="cat")
    for adapter in "ab":
        model.load_adapter(adapter, folder / adapter)
    return name, model, oracle.eval()


def request_of(name: str, row: int, choice: str | None, **options: Any) -> Request:
    ids = inputs_of(name, [row])["input_ids"][0].tolist()
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, logprobs=3, **options)
    return Request(ids, adapters=choice, images=pixels_of(name, [row]), sampling=sampling)


@torch.no_grad()
def expected_of(case: Case, row: int, choice: str | None) -> tuple[list[int], Tensor]:
    """PEFT's tokens and the log probabilities of each step [new, vocab]."""
    name, _, oracle = case
    options: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    made = alone(oracle, choice, lambda model: model.generate(**inputs_of(name, [row]), **options))
    return made.sequences[0, -NUM_NEW:].tolist(), torch.stack(made.logits)[:, 0].log_softmax(dim=-1)


def check(case: Case, results: Sequence[RequestResult], rows: Sequence[int], choices: Sequence[str | None]) -> None:
    for result, row, choice in zip(results, rows, choices, strict=True):
        assert result.error is None, result.error
        tokens, logprobs = expected_of(case, row, choice)
        assert list(result.token_ids) == tokens, f"row {row}"
        size = logprobs.max() - logprobs.min()
        for step, entry in enumerate(result.logprobs or ()):
            for token, logprob in entry.top:
                assert abs(logprobs[step, token] - logprob) < 1e-4 * size, f"row {row}, step {step}"


def run(model: MultiLoraModel, requests: Sequence[Request], **config: Any) -> list[RequestResult]:
    with Engine(model, EngineConfig(cache_bytes=2**24, **config)) as engine:
        return engine.generate(requests)


def test_requests_with_images_beside_texts_get_what_peft_gives_them_alone(case: Case) -> None:
    results = run(case[1], [request_of(case[0], row, choice) for row, choice in enumerate(CHOICES)])
    check(case, results, range(5), CHOICES)


def test_prompts_with_images_in_chunks_are_the_same(case: Case) -> None:
    """Chunks of five tokens end inside of images."""
    results = run(
        case[1],
        [request_of(case[0], row, choice) for row, choice in enumerate(CHOICES)],
        max_step_tokens=5,
        block_tokens=4,
    )
    check(case, results, range(5), CHOICES)


def test_the_prefix_cache_knows_images_from_others(case: Case) -> None:
    name, model, _ = case
    with Engine(model, EngineConfig(cache_bytes=2**24, block_tokens=2)) as engine:
        first = engine.generate([request_of(name, 0, "a")])
        again = engine.generate([request_of(name, 0, "a")])
        other_image = Request(
            request_of(name, 0, "a").prompt,
            adapters="a",
            images=pixels_of(name, [3]),
            sampling=request_of(name, 0, "a").sampling,
        )
        (other,) = engine.generate([other_image])
        check(case, first + again, [0, 0], ["a", "a"])
    has_states = name == "qwen3_5"  # of which no prefix is kept
    assert has_states or again[0].num_cached_tokens >= 10
    assert other.num_cached_tokens <= 1
    (fresh,) = run(model, [other_image])
    assert other.token_ids == fresh.token_ids
    assert other.logprobs != first[0].logprobs


def test_requests_that_lose_their_keys_and_values_go_on_with_their_images(case: Case) -> None:
    """There is room for two prompts but not for both answers, and no prefix cache to come back to."""
    name, model, _ = case
    if name == "qwen3_5":
        pytest.skip("its states need more than the keys and values of two sequences")
    token_bytes = sum(shape.token_bytes for shape in runner_shapes(model))
    config = EngineConfig(cache_bytes=36 * token_bytes, block_tokens=4, prefix_cache=False, fair_tokens=1)
    with Engine(model, config) as engine:
        results = engine.generate([request_of(name, row, choice) for row, choice in enumerate(CHOICES[:3])])
        assert engine.stats().num_preempted > 0
    check(case, results, range(3), CHOICES[:3])


def runner_shapes(model: MultiLoraModel) -> list[LayerShape]:
    with Engine(model, EngineConfig(cache_bytes=2**24)) as engine:
        return list(engine._runner.shapes.values())


def test_answers_of_one_request_share_its_features(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    name, model, _ = case
    calls = []
    encode = ImageEncoder._encode
    monkeypatch.setattr(ImageEncoder, "_encode", lambda self, *args: calls.append(1) or encode(self, *args))
    (result,) = run(model, [request_of(name, 1, "b", n=3)], max_step_tokens=5, block_tokens=4)
    tokens, _ = expected_of(case, 1, "b")
    assert [list(completion.token_ids) for completion in result.completions] == [tokens] * 3
    assert len(calls) == 1


def language_mixture(name: str, folder: Path) -> MultiLoraModel:
    """A mixture of adapters of the language model."""
    targets = r".*(language_model|text_model).*(q_proj|v_proj|down_proj)"
    model = MultiLoraModel(make(name))
    for seed, adapter in enumerate("xy"):
        random_peft_adapter(make(name), folder / adapter, targets=targets, seed=seed, lora_alpha=4)
        model.load_adapter(adapter, folder / adapter)
    random_peft_adapter(make(name), folder / "vision", targets="all-linear", seed=5, lora_alpha=2)
    model.load_adapter("vision", folder / "vision")
    model.create_mixture("mix", ["x", "y"], XLoraConfig(layerwise_scalings=True, xlora_depth=1))
    return model


def test_rows_of_a_mixture_with_images_are_those_of_generate(tmp_path: Path) -> None:
    name = "llava"
    model = language_mixture(name, tmp_path)
    choices = ("mix", "mix+x:0.5", "mix", None)
    results = run(model, [request_of(name, row, choice) for row, choice in enumerate(choices)], max_step_tokens=7)
    for row, (choice, result) in enumerate(zip(choices, results, strict=True)):
        options: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}
        own = model.generate(**inputs_of(name, [row]), adapters=[choice], eos_token_id=None, **options)
        assert list(result.token_ids) == own[0, -NUM_NEW:].tolist(), f"row {row}"


def test_gates_for_each_token_on_vision_modules_are_refused(tmp_path: Path) -> None:
    model = language_mixture("llava", tmp_path)
    model.create_mixture("seeing", ["x", "vision"], XLoraConfig(layerwise_scalings=True, xlora_depth=1))
    with Engine(model) as engine:
        for link, name in (("seeing", "seeing"), ("mix+vision", "vision")):
            with pytest.raises(RequestError, match=f"'{name}' adapts vision modules"):
                engine.add_request(request_of("llava", 0, link))


def test_what_images_need_is_said_before_anything_runs() -> None:
    def refused(name: str, request: Request, match: str, **config: Any) -> None:
        with Engine(MultiLoraModel(make(name)), EngineConfig(**config)) as engine:
            with pytest.raises((RequestError, TooLargeError), match=match):
                engine.add_request(request)
            assert not engine.has_work

    llava, qwen = pixels_of("llava", [0]), pixels_of("qwen3_vl", [0])
    prompt = request_of("llava", 0, None).prompt
    refused("gemma3", Request([1, IMAGE], images=pixels_of("gemma3", [0])), "see each other in both directions")
    refused("llava", Request([1, 2, 3], images=llava), "no image token")
    refused("llava", Request([1, IMAGE], images={"pixels": llava["pixel_values"]}), "give pixel_values")
    refused("llava", Request([1, IMAGE], images="a.png"), "give a list")
    refused("llava", Request([1, IMAGE], images=[b"no picture"]), "image 0 can't be read")
    refused("llava", Request([1, IMAGE], images=[b""] * 3), r"3 images; 2 are possible", max_images=2)
    refused("llava", Request([1, IMAGE], images=[encoded(64, 65)]), r"4160 pixels.*4096", max_image_pixels=4096)
    refused("qwen3_vl", Request([1, IMAGE], images=qwen), r"tells of 4 tokens of images, but the prompt has 1")
    refused("qwen3_vl", Request(prompt, images={"pixel_values": qwen["pixel_values"]}), "need image_grid_thw")
    llama = MultiLoraModel(tiny_model("llama"))
    with Engine(llama) as engine, pytest.raises(RequestError, match="'llama' takes none"):
        engine.add_request(Request([1, 2], images=llava))


def test_images_with_another_number_of_features_end_their_request_alone() -> None:
    name = "llava"
    wrong = Request([1, IMAGE, IMAGE, 2], images=pixels_of(name, [0]), sampling=SamplingParams(max_tokens=2))
    bad, good = run(MultiLoraModel(make(name)), [wrong, request_of(name, 0, None)])
    assert "make 4 features, but the prompt has 2 image tokens" in str(bad.error)
    assert good.error is None


def test_a_picture_of_too_many_pixels_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encoded(64, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(TooLargeError, match="image 0 has too many pixels"):
        decode_images([picture], EngineConfig())


def encoded(width: int, height: int, seed: int = 0) -> bytes:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed)).byte()
    file = io.BytesIO()
    Image.fromarray(values.numpy()).save(file, format="PNG")
    return file.getvalue()


# Pictures, as transformers' processors read them. The processors themselves need torchvision here, but for LLaVA's.


PICTURES = {
    "llava": (CLIPImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}),
    "mistral3": (PixtralImageProcessorPil, {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}}),
    "smolvlm": (
        SmolVLMImageProcessorPil,
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}, "do_image_splitting": True},
    ),
    "qwen2_5_vl": (
        Qwen2VLImageProcessorPil,
        {"min_pixels": 28 * 28, "max_pixels": 56 * 56, "patch_size": 14, "merge_size": 2},
    ),
}
BESIDE = ("[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<global-img>")
TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}|{% endfor %}"
)


def image_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; the image token is the models'."""
    own = tiny_tokenizer()
    special = [*BESIDE, *TILES]
    names = special + [f"<unused_{number}>" for number in range(IMAGE - len(own) - len(special))] + ["<image>"]
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *names]})
    own.chat_template = TEMPLATE
    assert own.convert_tokens_to_ids("<image>") == IMAGE
    return own


def picture_model(name: str, folder: Path) -> MultiLoraModel:
    kind, options = PICTURES[name]
    base = make(name)
    base.save_pretrained(folder)
    image_tokenizer().save_pretrained(folder)
    kind(**options).save_pretrained(folder)
    model = MultiLoraModel.from_pretrained(folder)
    model.load_adapter("a", random_peft_adapter(make(name), folder / "a", targets="all-linear", lora_alpha=2))
    return model


def processed(name: str, model: MultiLoraModel, text: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What transformers' processor does: each image token of the text replaced, then tokenized."""
    kind, options = PICTURES[name]
    config, tokenizer = model.base.config, model.tokenizer
    own: dict[str, Any] = {"images": list(pictures), "return_tensors": "pt"}
    if name == "mistral3":
        own["patch_size"] = config.vision_config.patch_size * config.spatial_merge_size
    if name == "smolvlm":
        own["return_row_col_info"] = True
    inputs = kind(**options)(**own)
    like = SimpleNamespace(
        image_token="<image>",
        image_processor=SimpleNamespace(merge_size=2),
        patch_size=14,
        spatial_merge_size=getattr(config, "spatial_merge_size", 1),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
        image_seq_len=TOKENS,
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    for index in range(len(pictures)):
        text = text.replace("<image>", REPLACED[name](like, inputs, index).replace("<image>", "<IMAGE>"), 1)
    ids = tokenizer(text.replace("<IMAGE>", "<image>"), return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = {key: value for key, value in inputs.items() if key not in ("rows", "cols")} | {"input_ids": ids}
    return made | ({"mm_token_type_ids": (ids == IMAGE).long()} if name.startswith("qwen") else {})


def pixtral_tokens(like: Any, inputs: Any, index: int) -> str:
    """PixtralProcessor's, whose class can't be imported without torchvision."""
    size = like.patch_size * like.spatial_merge_size
    height, width = (int(side) // size for side in inputs["image_sizes"][index])
    rows = ["<image>" * width] * height
    return "[IMG_BREAK]".join(rows) + "[IMG_END]"


REPLACED: dict[str, Callable[[Any, Any, int], str]] = {
    "llava": LlavaProcessor.replace_image_token,
    "mistral3": pixtral_tokens,
    "smolvlm": SmolVLMProcessor.replace_image_token,
    "qwen2_5_vl": Qwen2VLProcessor.replace_image_token,
}


@torch.no_grad()
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    model = picture_model(name, tmp_path)
    pictures = [encoded(61, 40), encoded(30, 75, seed=1)]
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "sort "}, {"type": "image"}]}]
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
    (result,) = run(model, [Request(turns, adapters="a", images=pictures, sampling=sampling)])
    text = "<|im_start|><image>sort <image>|"
    inputs = processed(name, model, text, [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures])
    assert list(result.prompt_token_ids) == inputs["input_ids"][0].tolist()
    oracle = peft.PeftModel.from_pretrained(make(name), str(tmp_path / "a"), "a").eval()
    own = oracle.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert list(result.token_ids) == own[0, -NUM_NEW:].tolist()


def test_a_prompt_has_one_image_token_for_each_picture(tmp_path: Path) -> None:
    model = picture_model("llava", tmp_path)
    with Engine(model) as engine, pytest.raises(RequestError, match="2 image tokens for 1 images"):
        engine.add_request(Request("<image>a<image>", images=[encoded(9, 9)]))


def test_the_first_of_two_pictures_stays_in_the_prefix_cache(tmp_path: Path) -> None:
    model = picture_model("qwen2_5_vl", tmp_path)
    first, second, third = (encoded(56, 56, seed) for seed in range(3))
    with Engine(model, EngineConfig(cache_bytes=2**24, block_tokens=2)) as engine:
        engine.generate([Request("<image>abc<image>a", images=[first, second])])
        (result,) = engine.generate([Request("<image>abc<image>a", images=[first, third])])
    assert result.num_cached_tokens >= TOKENS + 2
    assert result.num_cached_tokens < 2 * TOKENS + 3
