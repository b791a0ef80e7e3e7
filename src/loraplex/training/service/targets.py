"""Which modules a client's LoRA adapts: attention, feed-forward layers, the output layer."""

import re
from collections.abc import Mapping

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.weights import ModuleShape
from loraplex.errors import RequestError
from loraplex.layers.attach import AdaptableModel

# transformers' names of the blocks' parts, in the path of a module
_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention|attn\d*|mixer)([._]|$)", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"(^|[._])(mlp|ffn|ff|feed_forward|fc\d|fc_in|fc_out|dense_\w+|block_sparse_moe)([._]|$)", re.I
)


def target_modules(adaptable: AdaptableModel, *, attention: bool, feed_forward: bool, output: bool) -> tuple[str, ...]:
    """The targets of a LoRA: the modules' own names where these say which are meant, else their paths.

    Raises RequestError where the base model has no such modules.
    """
    paths = [path for path in adaptable.paths if _is_wanted(path, adaptable, attention, feed_forward, output)]
    if not paths:
        raise RequestError(
            f"train_attn is {attention}, train_mlp is {feed_forward} and train_unembed is {output}, but the base model "
            "has no such modules that can be adapted. Set another one."
        )
    names = tuple(sorted({path.rpartition(".")[2] for path in paths}))
    return names if _targeted(names, adaptable) == set(paths) else tuple(paths)


def _is_wanted(path: str, adaptable: AdaptableModel, attention: bool, feed_forward: bool, output: bool) -> bool:
    if adaptable.shapes[path].kind != "linear":
        return False
    if path == adaptable.output_module:
        return output
    return (attention and bool(_ATTENTION.search(path))) or (feed_forward and bool(_FEED_FORWARD.search(path)))


def _targeted(names: tuple[str, ...], adaptable: AdaptableModel) -> set[str]:
    shapes: Mapping[str, ModuleShape] = adaptable.shapes
    return set(expected_targets(LoraConfig(target_modules=names), shapes, output_module=adaptable.output_module))
