"""What each row of a variant must get: PEFT, transformers, and formulas in float64, one row at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.layers.rows.positions import depends_on_length
from loraplex.residual.layers import AttentionLayer
from loraplex.residual.modules import LinkedResidual, SteeringVector
from loraplex.xlora.head import ScalingHead
from tests.architectures.variants import kind_of, make_model
from tests.hook_oracle import Factors, Gate, Hook, as_oracle, hooked, logits_with, lora_hook
from tests.tiny_models import random_peft_adapter

LINK = "0:0.5+1"
START = 1  # of a decoder beside an encoder

Steps = tuple[list[int], Tensor]  # greedy tokens, and the logits that they were chosen from: [tokens, vocab]


class Oracle:
    """One variant, run by PEFT and transformers; every call is one row by itself.

    `dtype` is what the base model's weights are rounded to, `runs_in` what is computed in.
    """

    def __init__(
        self,
        name: str,
        folders: Mapping[str, Path],
        *,
        dtype: torch.dtype = torch.float32,
        runs_in: torch.dtype = torch.float32,
    ) -> None:
        self.name = name
        self.is_seq2seq = kind_of(name) == "seq2seq"
        self.base = make_model(name).to(dtype).to(runs_in)
        base = make_model(name).to(dtype).to(runs_in)
        options = {"autocast_adapter_dtype": runs_in == torch.float32}
        self._peft = peft.PeftModel.from_pretrained(base, str(folders["0"]), "0", **options).eval()
        self._peft.load_adapter(str(folders["1"]), "1", **options)
        self._peft.add_weighted_adapter(["0", "1"], [0.5, 1.0], "link", combination_type="cat")
        self._peft.eval()

    def model(self, choice: str | None) -> Any:
        """What runs rows of one choice of adapters: None, "0", "1" or LINK."""
        forget_lengths(self.base)
        forget_lengths(self._peft)
        if choice is None:
            return self.base
        self._peft.set_adapter("link" if choice == LINK else choice)
        return self._peft

    @torch.no_grad()
    def logits(self, choice: str | None, ids: Tensor, mask: Tensor | None = None) -> Tensor:  # [tokens, vocab]
        """The logits of every token of a row; of an encoder-decoder's decoder for its own part."""
        inputs = inputs_of(self.is_seq2seq, ids[None], None if mask is None else mask[None])
        logits: Tensor = self.model(choice)(**inputs).logits[0]
        return logits

    def steps(self, choice: str | None, ids: Tensor, mask: Tensor | None, num_tokens: int) -> Steps:
        """A row's greedy answer."""
        return greedy(self.model(choice), ids, mask, num_tokens)

    def logits_of_answer(self, choice: str | None, ids: Tensor, answer: Sequence[int]) -> Tensor:  # [tokens, vocab]
        """The logits of every token of a given answer, as `generate` has them."""
        model = self.model(choice)
        if not any(map(depends_on_length, self.base.modules())):
            return self.logits(choice, torch.cat([ids, torch.tensor(answer[:-1])]))[len(ids) - 1 :].float()
        return greedy(model, ids, None, len(answer), logits_processor=[_Forced(len(ids), answer)])[1]


class _Forced:
    """Lets generate choose given tokens."""

    def __init__(self, num_prompt: int, answer: Sequence[int]) -> None:
        self._num_prompt, self._answer = num_prompt, answer

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self._answer[ids.shape[1] - self._num_prompt]] = 0
        return forced


def forget_lengths(model: nn.Module) -> None:
    """Let dynamic NTK forget the longest sequence that it has seen, which it goes on with otherwise."""
    for module in model.modules():
        if is_dynamic(module):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.clone()


def is_dynamic(module: nn.Module) -> bool:
    """Whether a module's positions change with every token, so that keys in a cache are not those of a whole pass."""
    return getattr(module, "rope_type", None) == "dynamic"


def inputs_of(is_seq2seq: bool, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """The inputs of a forward pass over [rows, tokens]; a decoder beside an encoder reads their second half."""
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    if is_seq2seq:
        inputs["decoder_input_ids"] = ids[:, ids.shape[1] // 2 :]
    return inputs


@torch.no_grad()
def greedy(model: Any, ids: Tensor, mask: Tensor | None, num_tokens: int, **options: Any) -> Steps:
    """One row's greedy answer by transformers' generate."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids[None], attention_mask=mask[None], **generation(num_tokens), **options)
    tokens = out.sequences[0, -len(out.logits) :].tolist()
    return tokens, torch.stack(out.logits)[:, 0].float()


def generation(num_tokens: int) -> dict[str, Any]:
    """Greedy search that tells its logits."""
    return {
        "max_new_tokens": num_tokens,
        "min_new_tokens": num_tokens,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }


# Adapters


def write_adapters(name: str, folder: Path) -> dict[str, Path]:
    """Two adapters "0" and "1" of different ranks on the linear modules that PEFT adapts one row at a time."""
    model = make_model(name)
    names = linear_names(model)
    narrow = [suffix for suffix in names if not _is_expert(model, suffix)]
    without = [suffix for suffix in names if suffix != "out_proj"]  # whose weight state-space mixers read past it
    text = rf"(?!.*(vision|visual|embed_)).*\.({'|'.join(names)})"  # Gemma 4's vision tower has layers of its own kind
    for targets in (names, without, narrow, text):
        try:
            folders = {
                str(i): random_peft_adapter(model, folder / str(i), targets=targets, r=3 + i, seed=i + 1)
                for i in range(2)
            }
        except ValueError:  # PEFT doesn't adapt some of them in this model
            continue
        if _is_read_as_written(make_model(name), folders["0"]):
            return folders
    raise AssertionError(f"PEFT writes no adapter for {name}")


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the paths of all linear modules but the output layer."""
    output = model.get_output_embeddings()
    modules = {path: module for path, module in model.named_modules() if module is not output}
    plain = [path for path, module in modules.items() if type(module) in (nn.Linear, Conv1D)]
    # A subclass may be a router that returns tuples; Falcon's linear modules are all of a class of their own.
    paths = plain or [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    names = {path.rpartition(".")[2] for path in paths}
    return sorted(name for name in names if not name.isdigit())  # a number is a block's name too


def _is_read_as_written(model: PreTrainedModel, folder: Path) -> bool:
    """Whether PEFT reads every tensor of its own file where it was; it takes some for those of fused experts.

    Convolutions, which have other names' ends, are no linear modules.
    """
    if peft.LoraConfig.from_pretrained(str(folder)).target_parameters:
        return False
    read = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(model, str(folder)))
    written = load_file(folder / "adapter_model.safetensors")
    if any(tensor.ndim > 2 for tensor in written.values()):
        return False
    return read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in written)


def _is_expert(model: PreTrainedModel, suffix: str) -> bool:
    """Whether a module of this name belongs to feed-forward experts or to a state-space mixer."""
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == suffix]
    return any(part in path for path in paths for part in ("mlp", "moe", "expert", "feed_forward", "mamba", "mixer"))


# Mixtures, by X-LoRA's formula


class MixtureOracle:
    """X-LoRA over one base model: sum_i scaling_i * alpha_i/r_i * B_i A_i x at every adapted module.

    Two whole passes for every token, without a cache, as PEFT and the original package run.
    """

    def __init__(self, name: str, folders: Mapping[str, Path], head: ScalingHead) -> None:
        self.is_seq2seq = kind_of(name) == "seq2seq"
        self.base = make_model(name)
        self._head = head
        self._experts = [_factors(self.base, folder) for folder in folders.values()]
        paths = [path for path, _ in self.base.named_modules()]
        self._layers = [path for path in paths if any(path in expert for expert in self._experts)]

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:  # [tokens, vocab]
        inputs = inputs_of(self.is_seq2seq, ids[None], None)
        forget_lengths(self.base)
        scalings = self._head(self._last_hidden(inputs))  # [1, tokens, layers, experts]
        with hooked(self.base, self._hooks(scalings)):
            logits: Tensor = self.base(**inputs, use_cache=False).logits[0]
        return logits

    def _last_hidden(self, inputs: dict[str, Tensor]) -> Tensor:  # [1, tokens, hidden]
        hidden = self.base(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
        if hidden.ndim == 3:
            return hidden
        found: list[Tensor] = []  # Gemma 3n keeps several streams; the output layer reads the last state
        output = self.base.get_output_embeddings()
        handle = output.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        self.base(**inputs, use_cache=False)
        handle.remove()
        return found[0]

    def steps(self, ids: Tensor, num_tokens: int) -> Steps:
        """The greedy answer, every token from the whole sequence."""
        return whole_steps(self.logits, ids, num_tokens)

    def _hooks(self, scalings: Tensor) -> Iterator[tuple[str, Hook]]:
        def gate_of(expert: int) -> Gate:
            return lambda path, x: scalings[0, :, self._layers.index(path), expert].reshape(*x.shape[:-1], 1)

        for i, expert in enumerate(self._experts):
            for path, factors in expert.items():
                yield path, lora_hook(path, factors, gate_of(i))


def _factors(base: PreTrainedModel, folder: Path) -> dict[str, Factors]:
    """The weights by module path, as PEFT's own loader finds them."""
    adapted = peft.PeftModel.from_pretrained(base.__class__(base.config), str(folder)).eval()
    found = {}
    for path, module in adapted.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[path] = Factors(a.detach(), b.detach().T, float(module.scaling["default"]))
    return found


def whole_steps(logits_of: Callable[[Tensor], Tensor], ids: Tensor, num_tokens: int) -> Steps:
    """A greedy answer without a cache."""
    logits, tokens = [], []
    for _ in range(num_tokens):
        logits.append(logits_of(torch.cat([ids, ids.new_tensor(tokens)]))[-1].float())
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


# Residuals, by their formula


class ResidualOracle:
    """Eager attention of the base model in float64, and the formula of residuals added to each block's output."""

    def __init__(self, name: str, layers: Mapping[int, AttentionLayer]) -> None:
        self._layers = layers
        self.base = as_oracle(make_model(name))

    def logits(self, residual: LinkedResidual | SteeringVector, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logits [tokens, vocab] of a row."""
        forget_lengths(self.base)
        shown = None if mask is None else mask[None]
        return logits_with(self.base, self._layers, [(residual, 1.0)], ids[None], shown)[0].float()

    def steps(self, residual: LinkedResidual | SteeringVector, ids: Tensor, num_tokens: int) -> Steps:
        return whole_steps(lambda tokens: self.logits(residual, tokens), ids, num_tokens)
