"""One client's adapter in training: its weights, their gradient, the optimizer, and how far it is."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.fit import check_ranks
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import RequestError
from loraplex.layers.attach import AdaptableModel
from loraplex.training.adapters.parameters import TrainableLora, fresh_weights
from loraplex.training.core.adamw import FlatAdamW
from loraplex.training.core.parameters import factors_of
from loraplex.training.service.settings import LORA_ALPHA, AdamParams, RunSettings

_PARAMETERS, _GRADIENT = "parameters", "gradient"


class TrainingRun:
    """The state that a snapshot keeps. Used by one thread."""

    def __init__(self, settings: RunSettings, adaptable: AdaptableModel, device: torch.device) -> None:
        """With first weights from the seed. Raises ConfigError for a rank that a module can't have."""
        self.settings = settings
        self.config = lora_config(settings)
        paths = expected_targets(self.config, adaptable.shapes, output_module=adaptable.output_module)
        ranks = self.config.ranks_of(paths)
        check_ranks(ranks, adaptable.shapes)
        first = fresh_weights(adaptable.shapes, ranks, self.config.scalings_of(paths), settings.seed)
        self.lora = TrainableLora(self.config, first, adaptable, device)
        self.optimizer = FlatAdamW(self.lora.flat, AdamParams().learning_rate)
        self.num_steps = 0
        self.last_seq = 0  # of the requests that are done

    @property
    def gradient(self) -> Tensor:
        return self.optimizer.gradient

    @property
    def num_bytes(self) -> int:
        """Weights, gradient and moments."""
        return 4 * self.lora.flat.numel() * self.lora.flat.element_size()

    def step(self, params: AdamParams) -> dict[str, float]:
        """One step of AdamW with the gradient so far, which begins at 0 again.

        Raises RequestError for a gradient that is not finite: the weights stay, the gradient goes.
        """
        norm = self.optimizer.clip(params.grad_clip_norm or None)
        if not math.isfinite(norm):
            self.gradient.zero_()
            raise RequestError(
                "the gradient is not finite, so no step was taken, and it begins at 0 again. Look at the data since "
                "the last step: logprobs that are far from the policy's let ratios overflow."
            )
        self.optimizer.configure(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self.optimizer.step()
        self.num_steps += 1
        return {"grad_norm:mean": norm, "step:max": float(self.num_steps)}

    def adapter(self) -> Adapter:
        """A copy of the adapter as it is now."""
        return Adapter(config=self.config, layers=self.lora.layers())

    def load(self, layers: Mapping[str, LoraWeights], optimizer: Mapping[str, Tensor] | None) -> None:
        """Go on from a checkpoint's weights; without its optimizer, with a new one. Raises RequestError."""
        own = self.lora.layers()
        if own.keys() != layers.keys() or any(own[path].rank != layers[path].rank for path in own):
            raise RequestError(
                f"the checkpoint is of another LoRA: this run has rank {self.settings.rank} on "
                f"{list(self.settings.target_modules)}. Create a training client from the checkpoint instead."
            )
        ordered = {path: layers[path] for path in own}  # a file has an order of its own
        values = torch.cat([factor.detach().float().reshape(-1) for factor in factors_of(ordered)])
        self.lora.flat.data.copy_(values)
        self.optimizer.forget()
        if optimizer is not None:
            self._check_optimizer(optimizer)
            self.optimizer.restore(optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """A copy of what a snapshot keeps as tensors."""
        kept = {_PARAMETERS: self.lora.flat.detach(), _GRADIENT: self.gradient, **self.optimizer.tensors()}
        return {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what `tensors` were taken from. Raises ValueError or KeyError for those of another run."""
        self._check_optimizer(tensors)
        self.lora.flat.data.copy_(tensors[_PARAMETERS])
        self.gradient.copy_(tensors[_GRADIENT])
        self.optimizer.restore(tensors)

    def _check_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("optimizer.") and tensor.ndim and tensor.shape != self.lora.flat.shape:
                raise ValueError(f"{name!r} has shape {list(tensor.shape)}, the run {list(self.lora.flat.shape)}")


def lora_config(settings: RunSettings) -> LoraConfig:
    """As PEFT writes it."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=LORA_ALPHA,
        target_modules=settings.target_modules,
        base_model_name_or_path=settings.base_model,
        task_type="CAUSAL_LM",
    )
