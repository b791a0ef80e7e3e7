"""Who asks, from where, and which names that one may see, use and load."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol
from urllib.parse import urlsplit

from loraplex.errors import AdapterNotFoundError, LinkSyntaxError
from loraplex.models.auto.selection import Candidates
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routing.adapter_spec import AdapterSpec, Link, is_auto, parse_adapter_spec
from loraplex.server.api.api_errors import BAD_REQUEST, FORBIDDEN, HOST_NOT_ALLOWED, TOO_LARGE, ApiError, Status
from loraplex.server.auth.keys import KeyRecord
from loraplex.server.settings import NetworkSettings

Kind = Literal["base", "adapter", "mixture", "residual", "link", "auto"]

_MODEL_NOT_FOUND = Status(404, "invalid_request_error", "model_not_found")
_LARGEST_WEIGHT = 1000.0
_LONGEST_PART = 160  # characters of a name and its weight
_READING = ("GET", "HEAD", "OPTIONS")
_ANY = "*"


@dataclass(frozen=True)
class Principal:
    """The holder of a key; without keys, anyone."""

    key: KeyRecord | None = None

    @property
    def id(self) -> str:
        return "anonymous" if self.key is None else self.key.id

    @property
    def may_manage(self) -> bool:
        return self.key is None or self.key.manage

    def may_use(self, name: str) -> bool:
        return self.may_manage or any(fnmatchcase(name, pattern) for pattern in self._record.use)

    def may_load(self, name: str) -> bool:
        return self.may_manage or any(fnmatchcase(name, pattern) for pattern in self._record.load)

    @property
    def may_use_base(self) -> bool:
        return self.may_manage or self._record.base

    @property
    def max_new_tokens(self) -> int | None:
        return None if self.key is None else self.key.max_new_tokens

    @property
    def max_priority(self) -> int | None:
        return None if self.may_manage else self._record.max_priority

    def check_load(self, name: str) -> None:
        """Refuse a name that this key may not load, whether anything has it or not."""
        if not self.may_load(name):
            message = f"this key may not load, replace, pin or unload {name[:300]!r}."
            raise ApiError(FORBIDDEN, message, param="name")

    def check_manage(self) -> None:
        if not self.may_manage:
            raise ApiError(FORBIDDEN, "this key may not manage the server.")

    @property
    def _record(self) -> KeyRecord:
        assert self.key is not None, "an anonymous principal has no key"
        return self.key


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something that `model` can name."""

    name: str
    kind: Kind
    experts: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()  # of a link


class CheckpointAccess(Protocol):
    """Who may use what clients have trained here."""

    def may_use(self, name: str, principal: Principal) -> bool:
        """Whether a principal may use an adapter; True for one that wasn't trained here."""
        ...

    def adapter_for(self, text: str, principal: Principal) -> str:
        """The adapter of tinker://RUN/KIND/NAME, loaded. Raises ApiError."""
        ...


class VisibleModels:
    """The names of a server, as each principal sees them."""

    def __init__(self, model: MultiLoraModel, base_name: str, max_link_length: int) -> None:
        self._model = model
        self.base_name = base_name
        self.checkpoints: CheckpointAccess | None = None  # where adapters are trained
        self._max_link_length = max_link_length

    def entry(self, name: str) -> Entry | None:
        """What has this name now."""
        if name in self._model.mixtures:
            try:
                return Entry(name=name, kind="mixture", experts=self._model.mixtures.get(name).experts)
            except AdapterNotFoundError:  # unloaded this moment
                return None
        if name in self._model.store:
            return Entry(name=name, kind="adapter")
        return Entry(name=name, kind="residual") if name in self._model.registry.linked else None

    def visible(self, principal: Principal) -> list[Entry]:
        """What the principal may use, sorted by name."""
        entries = [self.entry(name) for name in self._model.names()]
        return [entry for entry in entries if entry is not None and self._may_use(entry, principal)]

    def find(self, name: str, principal: Principal) -> Entry:
        """A visible entry; others don't exist."""
        entry = self.entry(name)
        if entry is None or not self._may_use(entry, principal):
            raise self._not_found(name)
        return entry

    def candidates(self, principal: Principal) -> Candidates:
        """What `auto` may choose from."""
        index = self._model.registry.auto
        if principal.may_manage:
            return Candidates()
        entries = (self.entry(name) for name in index.names())
        names = tuple(entry.name for entry in entries if entry is not None and self._may_use(entry, principal))
        return Candidates(names=names, base=principal.may_use_base)

    def offers_auto(self, principal: Principal) -> bool:
        """Whether there is something that `auto` could choose."""
        return self._model.registry.auto.has_any(self.candidates(principal))

    def choice(self, text: str, principal: Principal) -> AdapterSpec:
        """What a request's `model` asks for, if the principal may use all of it."""
        if text == self.base_name:
            if not principal.may_use_base:
                raise self._not_found(text)
            return None
        if is_auto(text):
            return text
        if self.checkpoints is not None and text.startswith("tinker://"):
            return ((self.checkpoints.adapter_for(text, principal), 1.0),)
        link = self._parse(text)
        for name, _ in link:
            entry = self.entry(name)
            # Unknown and forbidden names take the same way and get the same answer.
            if entry is None or not self._may_use(entry, principal):
                raise self._not_found(text)
        return link

    def _parse(self, text: str) -> Link:
        if len(text) > (self._max_link_length + 1) * _LONGEST_PART:
            raise ApiError(TOO_LARGE, f"model has {len(text)} characters, too many for a link.", param="model")
        try:
            link = parse_adapter_spec(text)
        except LinkSyntaxError as error:
            raise ApiError(BAD_REQUEST, str(error), param="model") from error
        if len(link) > self._max_link_length:
            raise ApiError(
                TOO_LARGE,
                f"the link names {len(link)} adapters; {self._max_link_length} are possible (max_link_length).",
                param="model",
            )
        for name, weight in link:
            if abs(weight) > _LARGEST_WEIGHT:
                raise ApiError(
                    BAD_REQUEST,
                    f"the weight {weight:g} of {name!r} is too large: -{_LARGEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}.",
                    param="model",
                )
        return link

    def _may_use(self, entry: Entry, principal: Principal) -> bool:
        if self.checkpoints is not None and not self.checkpoints.may_use(entry.name, principal):
            return False
        return all(principal.may_use(name) for name in (entry.name, *entry.experts))

    def _not_found(self, name: str) -> ApiError:
        message = (
            f"the model {name[:300]!r} does not exist, or this key may not use it. GET /v1/models lists what it may."
        )
        return ApiError(_MODEL_NOT_FOUND, message, param="model")


def adapter_names(choice: AdapterSpec) -> tuple[str, ...]:
    """The names in a choice that `VisibleModels.choice` returned."""
    return () if choice is None or isinstance(choice, str) else tuple(name for name, _ in choice)


class OriginCheck:
    """Refuses what a browser sends for a page elsewhere.

    A page whose name resolves to this machine at its second look-up (DNS rebinding) is of the same origin to a browser:
    only the name, which stands in Host, gives it away. Addresses can't be rebound.
    """

    def __init__(self, network: NetworkSettings) -> None:
        self._names = {name.lower().rstrip(".") for name in (network.host, "localhost", *network.allowed_hosts)}
        bound = _address(network.host)
        self._takes_all_addresses = bound is not None and bound.is_unspecified
        self._origins = {origin.lower() for origin in network.cors_origins}

    def check(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise ApiError for a Host that isn't the server's, and for a change that a page of another origin wants."""
        known = [(name, value.decode("latin-1").strip().lower()) for name, value in headers]
        hosts = [value for name, value in known if name == b"host"]
        origins = [value for name, value in known if name == b"origin"]
        if len(hosts) > 1 or any(not self._is_own(host) for host in hosts):
            raise ApiError(
                HOST_NOT_ALLOWED,
                f"the Host {', '.join(hosts)[:200]!r} is not this server's. Call it by its address, or name it in "
                "allowed_hosts.",
            )
        if method in _READING or _ANY in self._origins:
            return
        for origin in origins:
            if origin not in self._origins and _host_of(origin) not in hosts:
                message = f"pages of {origin[:200]!r} may not call this server (cors_origins)."
                raise ApiError(HOST_NOT_ALLOWED, message)

    def _is_own(self, host: str) -> bool:
        name = _without_port(host).rstrip(".")
        if _ANY in self._names or name in self._names:
            return True
        address = _address(name)
        return address is not None and (address.is_loopback or self._takes_all_addresses)


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
