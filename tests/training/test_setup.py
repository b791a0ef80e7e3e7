"""What is checked against the base model and the data before the first step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import AdapterExistsError, BaseModelError, ConfigError, DatasetError
from loraplex.layers.attach import AdaptableModel
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training import AdapterJob, TrainConfig, train_adapters
from loraplex.training.adapters.setup import first_weights, make_states
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import records, tiny_job, tiny_tokenizer, write_records

BASE = tiny_model("llama")


def refuse(job: AdapterJob, output: Path) -> None:
    """Run one job; nothing may be left behind."""
    before = [parameter.clone() for parameter in BASE.parameters()]
    try:
        train_adapters(BASE, tiny_tokenizer(), jobs=[job], config=TrainConfig(output=output / "out"))
    finally:
        assert not (output / "out").exists()
        assert not any(module._forward_hooks for module in BASE.modules())
        assert all(map(torch.equal, before, BASE.parameters()))


def test_refuses_targets_that_the_base_does_not_have(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj", "qkv_proj"))
    with pytest.raises(ConfigError, match=r"target_modules has 'qkv_proj'.*'q_proj'"):
        refuse(tiny_job(tmp_path, "a", lora=lora), tmp_path)
    lora = LoraConfig(target_modules=("q_proj",), layers_to_transform=(7,))
    with pytest.raises(ConfigError, match="match no module"):
        refuse(tiny_job(tmp_path, "a", lora=lora), tmp_path)


def test_refuses_data_that_the_job_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        refuse(tiny_job(tmp_path, "a", eval_data=tmp_path / "none.jsonl"), tmp_path)
    single = write_records(tmp_path / "single.jsonl", records("text", 1))
    with pytest.raises(DatasetError, match="too few to hold out"):
        refuse(tiny_job(tmp_path, "a", data=single), tmp_path)
    with pytest.raises(ConfigError, match="warmup_steps is 10, but there are only 10 steps"):
        refuse(tiny_job(tmp_path, "a", warmup_steps=10), tmp_path)
    with pytest.raises(ConfigError, match="max_length is 1000, but the base model has 256 positions"):
        refuse(tiny_job(tmp_path, "a", max_length=1000), tmp_path)


def test_refuses_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(100)] + ["sort"])
    job = tiny_job(tmp_path, "a")
    with pytest.raises(DatasetError, match=r"a.jsonl:\d+ has the token 20\d, but the base model knows only 128"):
        train_adapters(BASE, tokenizer, jobs=[job], config=TrainConfig(output=tmp_path / "out"))


def test_refuses_records_on_which_an_alora_stays_off(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj",), alora_invocation_tokens=(127,))
    with pytest.raises(DatasetError, match=r"a.jsonl:1 lacks the invocation tokens \[127\]"):
        refuse(tiny_job(tmp_path, "a", lora=lora), tmp_path)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_refuses_models_that_do_not_predict_the_next_token(tmp_path: Path, name: str) -> None:
    with pytest.raises(BaseModelError, match="causal language model"):
        train_adapters(
            tiny_model(name),
            tiny_tokenizer(),
            jobs=[tiny_job(tmp_path, "a")],
            config=TrainConfig(output=tmp_path / "out"),
        )


def test_refuses_a_float16_base(tmp_path: Path) -> None:
    config = TrainConfig(output=tmp_path / "out")
    with pytest.raises(BaseModelError, match="float16"):
        train_adapters(
            tiny_model("llama", dtype=torch.float16), tiny_tokenizer(), jobs=[tiny_job(tmp_path, "a")], config=config
        )


def test_refuses_to_start_from_an_adapter_that_differs_from_the_job(tmp_path: Path) -> None:
    start = random_peft_adapter(BASE, tmp_path / "start", targets=("q_proj", "v_proj"), r=4, lora_alpha=8)
    job = tiny_job(tmp_path, "a", init_from=start)
    adaptable = AdaptableModel(BASE)
    assert first_weights(job, adaptable).keys() == read_adapter(start).layers.keys()
    for lora, message in [
        (LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj")), "rank 4"),
        (LoraConfig(r=4, lora_alpha=4, target_modules=("q_proj", "v_proj")), "LoRA scaling 2.0"),
        (LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",)), "other modules"),
    ]:
        with pytest.raises(ConfigError, match=message):
            refuse(replace(job, lora=lora), tmp_path)
    dora = random_peft_adapter(BASE, tmp_path / "dora", targets=("q_proj", "v_proj"), options={"use_dora": True})
    with pytest.raises(ConfigError, match="use_dora is False, but init_from has use_dora=True"):
        refuse(replace(job, init_from=dora), tmp_path)


def test_refuses_an_output_folder_with_adapters_but_no_checkpoint(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "a", max_steps=1)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    train_adapters(BASE, tiny_tokenizer(), jobs=[job], config=config)
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    with pytest.raises(AdapterExistsError, match="no checkpoint to go on from"):
        train_adapters(BASE, tiny_tokenizer(), jobs=[job], config=config)
    train_adapters(BASE, tiny_tokenizer(), jobs=[job], config=replace(config, resume=False))
    (tmp_path / "out" / "a" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterExistsError, match=r"notes\.txt"):
        train_adapters(BASE, tiny_tokenizer(), jobs=[job], config=replace(config, resume=False))


def test_fresh_weights_are_pefts_and_depend_on_the_jobs_seed_alone(tmp_path: Path) -> None:
    adaptable = AdaptableModel(BASE)
    lora = LoraConfig(r=4, target_modules=("q_proj", "embed_tokens"))
    jobs = [tiny_job(tmp_path, name, lora=lora, seed=seed) for name, seed in (("a", 1), ("b", 2), ("c", 1))]
    torch.manual_seed(5)
    first, second, third = (state.parameters.layers() for state in make_states(jobs, BASE, adaptable, tiny_tokenizer()))
    path = "model.layers.0.self_attn.q_proj"
    assert torch.equal(first[path].lora_a, third[path].lora_a)
    assert not torch.equal(first[path].lora_a, second[path].lora_a)
    bound = 1 / 64**0.5  # Kaiming uniform with a = sqrt 5 over 64 inputs
    assert 0.9 * bound < first[path].lora_a.abs().max() <= bound
    assert not first[path].lora_b.any()
    embedding = first["model.embed_tokens"]
    assert not embedding.lora_a.any()
    assert 0.7 < embedding.lora_b.std() < 1.3


def test_a_multi_lora_model_can_go_on_serving_other_adapters(tmp_path: Path) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    model.load_adapter("other", random_peft_adapter(model.base, tmp_path / "other", targets=("q_proj",)))
    ids = torch.arange(3, 9).unsqueeze(0)
    before = model(ids, adapters=["other"]).logits
    config = TrainConfig(output=tmp_path / "out", plots=False)
    (result,) = train_adapters(model, tiny_tokenizer(), jobs=[tiny_job(tmp_path, "a", max_steps=2)], config=config)
    assert torch.equal(model(ids, adapters=["other"]).logits, before)
    model.load_adapter("a", result.folder)
    assert not torch.equal(model(ids, adapters=["a"]).logits, model(ids).logits)
