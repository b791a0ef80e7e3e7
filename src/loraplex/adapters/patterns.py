"""Regular expressions from adapters' settings: they mean what Python's `re` says, in a time that nobody can stretch.

`re` tries all ways to match, which for "(.*)*(.*)*!" takes minutes that no signal ends. RE2 reads each name once, but
knows neither look-arounds nor back references, and reads some syntax in another way. So RE2 gets the patterns whose
meaning is the same in both, and `re` itself all others, in a child process whose time and memory are limited.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import re2

from loraplex.errors import ConfigError
from loraplex.validation import quoted

MAX_LENGTH = 32768  # characters of a pattern: all modules of a large model by name
MAX_MATCHES = 2_000_000  # patterns times names
MAX_SLOW = 4  # patterns of one option that only `re` knows
CHILD_CPU_S = 0.3
_CHILD_WALL_S = 20  # on a machine that is busy with other things
_CHILD_BYTES = 1 << 29

Method = Literal["fullmatch", "match"]
Found = Mapping[str, str | None]  # by name that matches: the group "idx", None without one

# Where a name is printable ASCII, RE2 and `re` take these in the same way. Not among them: sets that hold "[", which
# RE2 may read as a class such as [:alpha:], and "{,3}", which it reads literally.
_SAME_IN_RE2 = re.compile(
    r"""(?>
      [A-Za-z0-9_\ !"\#%&',/:;<=>@`~-]
    | \\[.^$*+?()\[\]{}|/\\dDwWsSbB-]
    | \[\^?(?>[A-Za-z0-9]-[A-Za-z0-9]|[A-Za-z0-9_.,/\ ]|\\[dDwW.-])+\]
    | \((?>\?:|\?P<[A-Za-z_][A-Za-z0-9_]*>|(?!\?))
    | [)|.^$]
    | [*+?]\??+(?![*+?])
    | \{[0-9]{1,3}(?>,[0-9]{0,3})?\}\??+(?![*+?])
    )*+""",
    re.VERBOSE,
)
_PLAIN = re.compile(r"[ -~]*+")
_ASCII_IN_RE2 = re.compile(r"\\[dDwWsSbB]")  # `re` knows the letters and digits of all scripts
_INDEX = "(?P<idx>"
_REPEATED_GROUP = re.compile(r"\)[*+{]")  # `re` ends a repetition that matches nothing: the same names, other groups

_CHILD = f"""
import json, re, resource, signal, sys, warnings
resource.setrlimit(resource.RLIMIT_AS, ({_CHILD_BYTES}, {_CHILD_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
warnings.simplefilter("ignore")
pattern, method, names = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, {CHILD_CPU_S})  # ends the process, wherever it is
try:
    match = getattr(re.compile(pattern), method)
except (re.error, OverflowError, RecursionError) as error:
    print(json.dumps({{"error": str(error)}}))
    sys.exit()
found = {{}}
for name in names:
    matched = match(name)
    if matched:
        found[name] = matched.groupdict().get("idx")
print(json.dumps({{"found": found}}))
"""


def check_patterns(option: str, patterns: Sequence[str], names: Sequence[str] = ()) -> None:
    """Raise ConfigError, which names the option, for what is no regular expression or can't be matched here."""
    check_number_of_matches(option, len(patterns), 1)
    slow = [pattern for pattern in patterns if _needs_child(option, pattern, names)]
    if len(slow) > MAX_SLOW:
        raise ConfigError(
            f"{option} has {len(slow)} patterns with look-arounds, back references or flags, such as "
            f"{quoted(slow[0])}; at most {MAX_SLOW} are matched. Write them without, or join them by '|'."
        )
    for pattern in slow:
        find_matches(option, pattern, ())


def find_matches(option: str, pattern: str, names: Sequence[str], method: Method = "fullmatch") -> Found:
    """Those of `names` that `re.fullmatch` or `re.match` finds the pattern in, with what the group "idx" holds.

    Raises ConfigError, which names the option the pattern is from: it is none, too long, or takes too much time.
    """
    if _needs_child(option, pattern, names):
        return _found_by_child(option, pattern, tuple(names), method)
    compiled, has_index = _compiled(option, pattern), _INDEX in pattern
    found = {}
    for name in names:
        matched = getattr(compiled, method)(name)
        if matched:
            found[name] = matched["idx"] if has_index else None
    return found


def check_number_of_matches(option: str, num_patterns: int, num_names: int) -> None:
    """Raise ConfigError where so many patterns can't be tried on so many names."""
    if num_patterns * num_names > MAX_MATCHES:
        raise ConfigError(
            f"{option} has {num_patterns} patterns for {num_names} modules; more than {MAX_MATCHES} pairs are not "
            "matched. Write fewer, wider patterns."
        )


def _needs_child(option: str, pattern: str, names: Sequence[str]) -> bool:
    if len(pattern) > MAX_LENGTH:
        raise ConfigError(
            f"{option} holds a pattern of {len(pattern)} characters; at most {MAX_LENGTH} are matched. List the "
            "modules in target_modules, or write a shorter pattern."
        )
    if _compiled(option, pattern) is None or (_INDEX in pattern and _REPEATED_GROUP.search(pattern) is not None):
        return True
    return not all(map(_PLAIN.fullmatch, names)) and _ASCII_IN_RE2.search(pattern) is not None


@lru_cache(maxsize=256)  # a compiled pattern takes up to 8 MiB
def _compiled(option: str, pattern: str) -> Any:
    """The pattern for RE2; None for one that only `re` knows, or that RE2 has no room for."""
    if _SAME_IN_RE2.fullmatch(pattern) is None:
        return None
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise _no_pattern(option, pattern, str(error)) from error
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error:
        return None


@lru_cache(maxsize=64)
def _found_by_child(option: str, pattern: str, names: tuple[str, ...], method: Method) -> Found:
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    asked = json.dumps([pattern, method, names])
    try:
        child = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_CHILD_WALL_S)
        answer = json.loads(child.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # killed at a limit: no answer
        raise ConfigError(
            f"{option} holds {quoted(pattern)}, which Python's re can't match within {CHILD_CPU_S} s and "
            f"{_CHILD_BYTES >> 20} MiB. Write it without nested repetitions, or without look-arounds and back "
            "references."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{option} holds {quoted(pattern)}, which needs a process of its own, and none could be started: {error}. "
            "Write it without look-arounds and back references."
        ) from error
    if "error" in answer:
        raise _no_pattern(option, pattern, answer["error"])
    found: Found = answer["found"]
    return found


def _no_pattern(option: str, pattern: str, reason: str) -> ConfigError:
    return ConfigError(f"{option} holds {quoted(pattern)}, which is not a regular expression: {reason}.")
