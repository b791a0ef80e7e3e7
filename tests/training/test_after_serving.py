"""A model that has served can train: what engines did to its weights leaves them readable for gradients."""

import torch

from loraplex import MultiLoraModel
from loraplex.training import TrainConfig, train_adapters
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer


def test_adapters_are_trained_on_a_model_that_has_generated(tmp_path):
    losses = []
    for has_served in (False, True):
        model = MultiLoraModel(tiny_model("llama"))
        if has_served:
            model.generate(torch.arange(3, 9)[None], max_new_tokens=2)
        job = tiny_job(tmp_path, "a", max_steps=3)
        config = TrainConfig(output=tmp_path / str(has_served), plots=False)
        losses.append(train_adapters(model, tiny_tokenizer(), jobs=[job], config=config)[0].train_losses)
    assert losses[0] == losses[1]
