"""One exception tree. Every message names the offending value, what was possible, and the fix."""

from collections.abc import Sequence
from typing import Any

MAX_MESSAGE = 4000  # characters: a message quotes what others wrote


class LoraplexError(Exception):
    """Base of every error that loraplex raises on purpose. A message that is too long loses its middle."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(LoraplexError):
    """An option has a value that can't be used."""


class MissingExtraError(ConfigError):
    """Something was asked for whose packages are not installed; the message names the extra that brings them."""


class AdapterError(LoraplexError):
    """Something is wrong with one adapter."""


class AdapterFormatError(AdapterError):
    """An adapter's files are damaged: missing or extra tensors, wrong shapes, NaN, truncated, not safetensors."""


class UnsupportedAdapterError(AdapterError):
    """An adapter's settings can't be honoured exactly; the message names the setting."""


class BaseModelMismatchError(AdapterError):
    """An adapter was made for another base model: its modules or their shapes are not in this one."""


class AdapterNotFoundError(AdapterError):
    """A request or call names an adapter that is not loaded."""


class AdapterExistsError(AdapterError):
    """An adapter of that name is loaded already."""


class AdapterChangedError(AdapterError):
    """An adapter's files changed on disk after it was loaded, so its weights can't be read back."""


class MixtureError(AdapterError):
    """A mixture can't be made of these experts, or a call would take from a mixture what it needs."""


class NameFormatError(AdapterError):
    """An adapter's name is not 1 to 128 characters of letters, digits, '.', '_', '-' and '/'."""


class CapacityError(LoraplexError):
    """A tier of the store (slots, host memory) has no room for what a call needs at once."""


class TooLargeError(CapacityError):
    """A request needs more than there is room for at all: waiting doesn't help."""


class QueueFullError(CapacityError):
    """More requests are in the engine than it takes; try again later."""


class RequestError(LoraplexError):
    """A request can't be served as written; nothing was run."""


class LinkSyntaxError(RequestError):
    """A link is malformed: the grammar is name[:weight] joined by '+', weights are finite floats."""


class BatchError(RequestError):
    """A batch is empty, or its rows and its list of adapters have different lengths."""


class DatasetError(LoraplexError):
    """A training file or one of its records can't be used; the message names file and line."""


class CheckpointError(LoraplexError):
    """A training checkpoint doesn't match the run that wants to resume from it."""


class TrainingError(LoraplexError):
    """A job's loss or gradients are no longer finite, so it was stopped; `results` tells what became of all jobs."""

    def __init__(self, message: str, results: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.results = tuple(results)


class EngineError(LoraplexError):
    """The engine failed, for one request or for all that it had; the message has what happened."""


class EngineStoppedError(EngineError):
    """The engine has failed too often, and takes no more requests."""


class BaseModelError(LoraplexError):
    """The base model can't be found, converted or loaded."""


class CompatibilityError(LoraplexError):
    """vLLM is another version than the plugin knows, or what the plugin builds on is no longer there."""


class UnsupportedEngineError(LoraplexError):
    """vLLM runs in a way in which links or mixtures are not known to be right; the message names it."""


class RemoteError(LoraplexError):
    """A server on the network can't be reached, or answers what it shouldn't."""


class OutputError(LoraplexError):
    """A result can't be written: no room, no permission, or something in its place that loraplex didn't write."""


class ScalingsError(LoraplexError):
    """Scalings don't fit their names, one another, or what is asked of them."""


class ScalingsFileError(ScalingsError):
    """A file of scalings can't be written, or is damaged or something else."""


def _cut(message: str) -> str:
    if len(message) <= MAX_MESSAGE:
        return message
    half = MAX_MESSAGE // 2 - 50
    return f"{message[:half]} ... ({len(message) - 2 * half} characters left out) ... {message[-half:]}"
