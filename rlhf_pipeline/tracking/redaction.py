"""Hide credentials in whatever is dumped, shown or sent: configs, messages, summaries.

Two rules. A value is hidden when its *key* names a secret (`api_key`, `hub.token`, `password`), and any text
that *looks like* a known credential is hidden wherever it stands (`hf_...`, `sk-...`,
`https://user:password@host`). Keys are judged by whole words: in `token_budget` and `tokenizer` the token is
not a secret, in `hf_token` it is. What is left out: nothing here searches for secrets by entropy, so a
credential of an unknown shape under a harmless key stays readable.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

MASK = "***"

_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def _words(text: str) -> list[str]:
    """The lower-case words of a key in any spelling: "hub.accessToken" is hub, access, token."""
    return [word for word in re.split(r"[^a-z0-9]+", _CAMEL_HUMP.sub("_", text).lower()) if word]


# The last word of a key decides: "token_budget" is a budget, "hf_token" is a token.
_SECRET_WORDS = frozenset(
    _words(
        "secret secrets password passwords passwd pwd passphrase credential credentials apikey apikeys auth"
        " authorization cookie"
    )
)
_AMBIGUOUS_WORDS = frozenset({"token", "key"})
_AMBIGUOUS_PLURALS = frozenset({"tokens", "keys"})
# What a "token" or a "key" is after one of these words: part of a text or of a record, not a credential.
_HARMLESS_BEFORE = {
    "token": frozenset(
        _words(
            "pad eos bos unk sep cls mask stop start begin end special extra added image audio video per each"
            " first last next previous max min num prompt response target source system user assistant tool"
            " thinking"
        )
    ),
    "key": frozenset(
        _words(
            "sort group cache prompt response text column field data label id primary foreign index messages"
            " metric chosen rejected score reward public join image state config"
        )
    ),
}
# A plural is harmless ("max_tokens", "keys") unless this word stands before it.
_SECRET_BEFORE_PLURAL = frozenset(_words("api access auth secret private hf wandb"))
# A wandb key of the old form is 40 hex digits, and so is a git commit: under these words it is a commit.
_COMMIT_WORDS = frozenset(_words("revision revisions commit sha sha1 ref git hash hashes fingerprint digest version"))

_FORTY_HEX = re.compile(r"(?:local-)?[0-9a-fA-F]{40}")
_ASSIGNMENT = re.compile(r"(?<![\w.-])(?P<key>[A-Za-z][\w.-]*)=(?P<value>\"[^\"]*\"|'[^']*'|[^\s&;,\"']+)")
_WITH_PREFIX = (
    (re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)[^\s/:@]*:[^\s/]+@"), rf"\g<1>{MASK}@"),
    (re.compile(r"\b(https?://)[^\s/:@]+@"), rf"\g<1>{MASK}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{16,}"), rf"\g<1> {MASK}"),
    (re.compile(r"(hooks\.slack\.com/services/)\S+"), rf"\g<1>{MASK}"),
)
_CREDENTIAL = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-(?=[\w-]*\d)[\w-]{20,}"  # OpenAI, Anthropic
    r"|wandb_v\d+_\w{20,}|local-[0-9a-f]{40}"  # Weights & Biases
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"  # GitHub, GitLab
    r"|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abeprs]-[\w-]{10,}"  # AWS, Google, Slack
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"  # a JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r")"
)


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config`, with all that is nested in it, in which every credential reads `***`.

    Dataclasses become mappings, and the argument is not changed. Empty strings, None and booleans are never
    hidden: they hold no secret, and "no token was given" is worth seeing.
    """
    return {key: _redact_value(value, key=str(key)) for key, value in config.items()}


def redact_text(text: str) -> str:
    """`text` with whatever looks like a credential, and the value of every `secret_key=value`, as `***`."""
    return _ASSIGNMENT.sub(_mask_assignment, redact_credentials(text))


def redact_credentials(text: str) -> str:
    """`text` with whatever looks like a credential as `***`; for messages that speak of keys and values themselves."""
    for pattern, replacement in _WITH_PREFIX:
        text = pattern.sub(replacement, text)
    return _CREDENTIAL.sub(MASK, text)


def _mask_assignment(match: re.Match[str]) -> str:
    words = _words(match["key"])
    secret = _names_secret(words) or _names_possible_secret(words)
    return f"{match['key']}={MASK}" if secret else match[0]


def _redact_value(value: Any, *, key: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    words = _words(key)
    if _names_secret(words):
        return _mask_leaves(value, numbers=True)
    if _names_possible_secret(words):
        return _mask_leaves(value, numbers=False)
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _like(value, [_redact_value(item, key=key) for item in value])
    if isinstance(value, PurePath):
        shown = redact_text(str(value))
        return value if shown == str(value) else shown
    if not isinstance(value, str):
        return value
    if _FORTY_HEX.fullmatch(value.strip()) and not (words and words[-1] in _COMMIT_WORDS):
        return MASK
    return redact_text(value)


def _mask_leaves(value: Any, *, numbers: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _mask_leaves(item, numbers=numbers) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return _like(value, [_mask_leaves(item, numbers=numbers) for item in value])
    if value is None or isinstance(value, bool) or value == "":
        return value
    # A number under "token" is a token id; a number under "password" is a password.
    return value if isinstance(value, (int, float)) and not numbers else MASK


def _like(container: Any, items: list[Any]) -> Any:
    """The items in a container of the same kind; a named tuple becomes a plain one."""
    return tuple(items) if isinstance(container, tuple) else type(container)(items)


def _names_secret(words: list[str]) -> bool:
    return bool(words) and words[-1] in _SECRET_WORDS


def _names_possible_secret(words: list[str]) -> bool:
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in _AMBIGUOUS_PLURALS:
        return before in _SECRET_BEFORE_PLURAL
    return last in _AMBIGUOUS_WORDS and before not in _HARMLESS_BEFORE[last]
