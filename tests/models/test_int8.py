"""A base model with 8-bit weights: the same values as the model with its dequantized weights, whatever runs on it."""

import json
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import loraplex
from loraplex import Engine, MultiLoraModel, Request, SamplingParams
from loraplex.errors import BaseModelError, ConfigError
from loraplex.kernels.int8_weight import Int8Weight, is_int8
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model

pytestmark = pytest.mark.needs("compiler")
# Of the largest logit: activations are rounded to bfloat16 on both sides, at other places.
TOLERANCE = 0.03


def save(name: str, folder):
    tiny_model(name, dtype=torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("int8")
    save("llama", root / "base")
    for seed, name in enumerate(("a", "b")):
        random_peft_adapter(tiny_model("llama"), root / name, targets=linear_targets("llama"), seed=seed)
    random_peft_adapter(tiny_model("llama"), root / "dora", targets=linear_targets("llama"), options={"use_dora": True})
    return root


def load(folders) -> MultiLoraModel:
    model = MultiLoraModel.from_pretrained(folders / "base", weights="int8")
    for name in ("a", "b", "dora"):
        model.load_adapter(name, folders / name)
    return model


def dequantized(folders, dtype=torch.float32) -> nn.Module:
    """transformers' model with the 8-bit model's values."""
    held = MultiLoraModel.from_pretrained(folders / "base", weights="int8").base
    plain = tiny_model("llama").to(dtype)
    values = {
        path: (weight.to_values(dtype) if isinstance(weight, Int8Weight) else weight.to(dtype))
        for path, weight in held.named_parameters()
    }
    plain.load_state_dict(values)
    return plain.eval()


def prompts(rows=3):
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE, (rows, 9))
    return ids, torch.ones_like(ids)


def test_layers_and_output_are_in_8_bits_and_the_rest_in_bfloat16(folders):
    base = load(folders).base
    held = {path for path, module in base.named_modules() if is_int8(module)}
    assert held == {path for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert "lm_head" in held
    assert {weight.dtype for weight in base.parameters()} == {torch.bfloat16}
    assert type(base.get_input_embeddings().weight) is nn.Parameter


def distance(found, expected) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["a", "b", "dora"])
def test_logits_are_those_of_peft_on_the_dequantized_weights(folders, name):
    ids, mask = prompts()
    with torch.inference_mode():
        expected, rounded = (
            PeftModel.from_pretrained(dequantized(folders, dtype), folders / name)(ids, attention_mask=mask).logits
            for dtype in (torch.float32, torch.bfloat16)
        )
    ours = load(folders)(ids, mask, adapters=[name] * 3).logits
    assert distance(ours, expected) <= 1.3 * distance(rounded, expected)


def test_an_adapters_output_layer_is_served_where_it_is_not_that_of_the_base(folders, tmp_path):
    plain = tiny_model("llama", dtype=torch.bfloat16)
    ids, mask = prompts()
    model = load(folders)
    model.load_adapter("c", random_peft_adapter(plain, tmp_path / "c", targets=["q_proj", "lm_head"]))
    whole, without = (model(ids, mask, adapters=[spec] * 3).logits for spec in ("c", None))
    assert not torch.equal(whole, without)
    assert not model.store.version("c").changed
    other = random_peft_adapter(tiny_model("llama", seed=9), tmp_path / "d", targets=["q_proj", "lm_head"])
    unquantized = MultiLoraModel(plain)
    for served in (model, unquantized):
        served.load_adapter("d", other)
        assert served.store.version("d").changed == {"lm_head"}
    own, expected = (served(ids, mask, adapters=["d"] * 3).logits.float() for served in (model, unquantized))
    assert (own - expected).abs().max() <= TOLERANCE * (expected.max() - expected.min())
    assert (own - whole).abs().max() > 5 * (own - expected).abs().max()


def test_the_engine_and_generate_agree_with_forward(folders):
    model = load(folders)
    ids, mask = prompts()
    adapters = ["a", None, "a:0.5+b:0.5"]
    whole = model.generate(ids, mask, adapters=adapters, max_new_tokens=8, do_sample=False, packed=True)
    logits = model(whole, torch.ones_like(whole), adapters=adapters).logits.float()
    for row in range(3):
        for place in range(9, 17):
            chosen = logits[row, place - 1]
            assert chosen.max() - chosen[whole[row, place]] <= TOLERANCE * chosen.abs().max()
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    requests = [
        Request(row.tolist(), adapters=spec, sampling=sampling) for row, spec in zip(ids, adapters, strict=True)
    ]
    with Engine(model) as engine:
        together = [result.token_ids for result in engine.generate(requests)]
        alone = [engine.generate([request])[0].token_ids for request in requests]
        stacks = [vars(layer)["loraplex_stack"][0] for layer in model.base.modules() if "loraplex_stack" in vars(layer)]
        assert stacks
        layers = [layer for stack in stacks for layer in stack._layers]
        assert all(is_int8(layer.get_submodule(path)) for layer, parts in layers for path in parts.linears if path)
    assert together == alone
    assert [list(tokens) for tokens in together] == whole[:, 9:].tolist()


def test_an_engine_leaves_the_weights_in_8_bits(folders):
    model = load(folders)
    with Engine(model) as engine:
        engine.generate([Request([5, 6, 7], sampling=SamplingParams(max_tokens=2))])
    assert sum(map(is_int8, model.base.modules())) == 15
    model.close()
    assert sum(map(is_int8, model.base.modules())) == 15


def test_a_tied_embedding_keeps_its_table(tmp_path):
    plain = tiny_model("llama").bfloat16()
    plain.config.tie_word_embeddings = True
    plain.tie_weights()
    plain.save_pretrained(tmp_path / "base")
    base = MultiLoraModel.from_pretrained(tmp_path / "base", weights="int8").base
    assert is_int8(base.lm_head)
    assert torch.equal(base.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    ids, _ = prompts()
    reference = deepcopy(plain)
    reference.lm_head.weight = nn.Parameter(base.lm_head.weight.unpack())
    for ours, theirs in zip(base.model.layers.modules(), reference.model.layers.modules(), strict=True):
        if is_int8(ours):
            theirs.weight = nn.Parameter(ours.weight.unpack())
    with torch.inference_mode():
        found, expected = base(ids).logits.float(), reference(ids).logits.float()
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_saved_model_has_the_dequantized_values_and_says_so(folders, tmp_path):
    base = MultiLoraModel.from_pretrained(folders / "base", weights="int8").base
    base.save_pretrained(tmp_path / "saved")
    assert "int8" in json.loads((tmp_path / "saved" / "config.json").read_text())["loraplex_weights"]
    again = MultiLoraModel.from_pretrained(tmp_path / "saved").base
    for path, weight in base.named_parameters():
        expected = weight.unpack() if isinstance(weight, Int8Weight) else weight
        assert torch.equal(again.get_parameter(path), expected), path
    assert load_file(tmp_path / "saved" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_adapters_are_trained_on_it_as_on_the_dequantized_weights(folders):
    ids, _ = prompts()
    gradients = []
    for base in (
        MultiLoraModel.from_pretrained(folders / "base", weights="int8").base,
        dequantized(folders),
        dequantized(folders, torch.bfloat16),
    ):
        peft = PeftModel.from_pretrained(base, folders / "a", is_trainable=True)
        peft(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.float() for name, p in peft.named_parameters() if p.grad is not None})
    ours, expected, rounded = (torch.cat([grad.flatten() for grad in one.values()]) for one in gradients)
    assert gradients[0].keys() == gradients[1].keys()
    assert distance(ours, expected) <= 2 * distance(rounded, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int4"}, "int4.*int8"),
        ({"weights": "int8", "dtype": "float32"}, "bfloat16"),
        ({"weights": "int8", "dtype": "float16"}, "bfloat16"),
        ({"weights": "int8", "device": "meta"}, "CPU"),
    ],
)
def test_what_cannot_be_is_refused(folders, options, message):
    with pytest.raises(ConfigError, match=message):
        MultiLoraModel.from_pretrained(folders / "base", **options)


def test_a_machine_without_the_compiled_kernel_is_refused(folders, monkeypatch):
    monkeypatch.setattr(loraplex.models.checkpoints.int8_base, "native_available", lambda: False)
    with pytest.raises(ConfigError, match="compiler"):
        MultiLoraModel.from_pretrained(folders / "base", weights="int8")


def test_modules_that_are_not_plain_stay_in_bfloat16(tmp_path):
    save("gpt2", tmp_path / "base")
    base = MultiLoraModel.from_pretrained(tmp_path / "base", weights="int8").base
    assert [path for path, module in base.named_modules() if is_int8(module)] == ["lm_head"]


def test_a_model_without_linear_modules_is_refused():
    from loraplex.models.checkpoints.int8_base import int8_modules

    model = tiny_model("llama")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, nn.Identity())
    with pytest.raises(BaseModelError, match="no plain linear module"):
        int8_modules(model)


# Memory of the process's own: pages of the file that is read are the system's, which takes them back.
_MEASURE = """
import json, sys, threading, time
from loraplex import MultiLoraModel
from loraplex.kernels.native import native_available
import transformers.models.llama.modeling_llama

native_available()
def now():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
before, seen, done = now(), [], threading.Event()
def look():
    while not done.is_set():
        seen.append(now())
        time.sleep(0.002)
watcher = threading.Thread(target=look)
watcher.start()
model = MultiLoraModel.from_pretrained(sys.argv[1], weights="int8")
done.set()
watcher.join()
print(json.dumps([before, max(seen), now()]))
"""


def test_loading_never_holds_two_whole_copies(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=8, vocab_size=512
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path / "base")
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1024
    assert size >= 256 * 1024
    del model
    made = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "base")], capture_output=True, text=True, check=True
    )
    before, most, after = json.loads(made.stdout.strip().splitlines()[-1])
    assert most - before <= 1.35 * size, [before, most, after, size]
    assert after - before <= 0.7 * size, [before, most, after, size]
