"""Bodies of the calls that manage adapters and that tokenize."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from loraplex.server.api.schemas.base import Body, TokenIds
from loraplex.server.api.schemas.generation import Message

Name = Annotated[str, Field(min_length=1, max_length=128)]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]


class LoadAdapter(Body):
    """Load what is in a folder below the adapter roots."""

    name: Name
    path: PathText
    kind: Literal["adapter", "mixture", "residual"] | None = None  # None: what the folder holds
    # In the head's order, the folder of each; null: loaded already.
    experts: dict[Name, PathText | None] | None = Field(None, max_length=64)
    pinned: bool = False


class ReplaceAdapter(Body):
    """Load another version under the same name."""

    path: PathText


class ChangeAdapter(Body):
    pinned: bool


class VllmLoadAdapter(Body):
    """vLLM's body."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"base_model_name": (None,), "is_3d_lora_weight": (None, False)}

    lora_name: str = Field(max_length=128)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool = False


class VllmUnloadAdapter(Body):
    """vLLM's body; its number has no meaning here."""

    lora_name: str = Field(max_length=128)
    lora_int_id: int | None = None


class Tokenize(Body):
    """vLLM's body: a prompt, or the messages of a chat."""

    model: str | None = Field(None, max_length=8192)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class Detokenize(Body):
    model: str | None = Field(None, max_length=8192)
    tokens: TokenIds
