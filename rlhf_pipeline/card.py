"""The model card of an artifact: `README.md` as the hub shows it, made of the manifest alone.

Every name and path in a manifest is somebody's text: it is shown as code, so that it can neither break a table nor
become a link, and whatever looks like a credential is hidden. What the manifest does not know (a licence, who is to
use the model) is left to people, who may edit the card: no checksum covers it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rlhf_pipeline.tracking.redaction import redact, redact_text

# What of the config is shown, in this order; a pattern takes what those before it left.
FIGURES = """
objective.name objective.loss objective.* advantage.* kl.* policy.* value.clip value.optim.lr
rewards.*.weight rewards.*.model.path rewards.*.program rewards.*.url rollout.* ptx.coefficient ema.*
lora.* optim.* batch.* train.epochs train.max_steps data.train data.heldout data.max_length model.dtype
engine.zero_stage seed
"""
_TASKS = {"policy": "text-generation", "reward_model": "text-classification"}
_STAGE_TAGS = {"rm": "reward-model"}  # others are called as their commands
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_LIMITS = {
    "policy": "The numbers above hold for the data that they were measured on; elsewhere its answers may be wrong or "
    "harmful, and nothing checks them.",
    "reward_model": "Its rewards say which of two answers to one prompt the makers of its data would prefer, not what "
    "is true or harmless; a policy trained against it finds its mistakes.",
}
_LANGUAGE_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{prompt}
output = model.generate(
    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens={max_new_tokens}
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_QUESTION = """\
messages = [{"role": "user", "content": "What is a prime number?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_BEGINNING = """inputs = tokenizer("It was a bright cold day", return_tensors="pt")"""
_CLASSIFIER = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # where this file lies, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
messages = [
    {{"role": "user", "content": "What is a prime number?"}},
    {{"role": "assistant", "content": "A number that only 1 and itself divide."}},
]
text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()  # its reward is read at the end token
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
shift, scale = {shift!r}, {scale!r}
print((logits[0, 0].item() - shift) / scale)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What the weights say of themselves."""

    parameters: int
    dtypes: tuple[str, ...]
    context: int | None  # tokens; None for a model that sets no bound


def model_card(
    manifest: Mapping[str, Any], *, size: Size, ancestors: Mapping[str, Mapping[str, Any]], base_model: str | None
) -> str:
    """The card's text, the same for the same arguments.

    Args:
        manifest: as in artifact.json.
        ancestors: manifests of parents, and of theirs, by content hash; those that are missing end their line.
        base_model: where the line of models began. It is named in the front matter where it can be a hub id: the hub
            refuses a card whose base is a folder.
    """
    shown = redact(manifest)
    name = shown["config"].get("name", shown["stage"])
    sections = (
        ("What it is", _facts(shown, size)),
        ("How to open it", f"```python\n{_snippet(shown, size)}```"),
        ("Data", _data(shown["data"])),
        ("Last evaluation", _metrics(shown["metrics"])),
        ("Training", _training(shown["config"])),
        ("Lineage", _lineage(shown["parents"], ancestors)),
        ("Limits", _LIMITS.get(shown["kind"], _LIMITS["policy"])),
    )
    title = f"# {_code(name)}: {_plain(shown['kind'])} of {_code('rlhf ' + str(shown['stage']))}"
    parts = [_front_matter(shown, base_model), title, *(f"## {heading}\n\n{text}" for heading, text in sections)]
    return "\n\n".join(parts) + "\n"


def root(manifest: Mapping[str, Any], ancestors: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The plain folder or hub id that the line of models began with; None for one that began from scratch or is lost."""
    seen: set[str] = set()
    while (one := manifest["parents"].get("model")) is not None:
        if one["content_hash"] is None:
            return str(one["path"])
        if one["content_hash"] in seen or one["content_hash"] not in ancestors:
            return None
        seen.add(one["content_hash"])
        manifest = ancestors[one["content_hash"]]
    return None


def _front_matter(manifest: Mapping[str, Any], base_model: str | None) -> str:
    lines = ["---", "library_name: transformers"]
    if manifest["kind"] in _TASKS:
        lines.append(f"pipeline_tag: {_TASKS[manifest['kind']]}")
    if base_model is not None and _HUB_ID.fullmatch(redact_text(base_model)):
        lines.append(f"base_model: {json.dumps(base_model)}")
    stage = manifest["stage"]
    tags = ("rlhf", _STAGE_TAGS.get(stage, stage), _objective(manifest["config"]))
    slugs = dict.fromkeys(re.sub(r"[^a-z0-9]+", "-", str(tag).lower()).strip("-") for tag in tags if tag)
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(slug)}" for slug in slugs if slug), "---"])


def _objective(config: Mapping[str, Any]) -> Any:
    """Its name: of direct objectives, of a reward model's loss, or of PPO's advantages; None of a stage without a choice."""
    flat = dict(_flat(config))
    return next((flat[key] for key in ("objective.name", "objective.loss", "advantage.estimator") if key in flat), None)


def _facts(manifest: Mapping[str, Any], size: Size) -> str:
    rows = [
        ("kind", _plain(manifest["kind"])),
        ("made by", f"{_code('rlhf ' + str(manifest['stage']))}, after step {_value(manifest['step'])}"),
        ("parameters", _value(size.parameters)),
        ("weights", ", ".join(size.dtypes)),
        ("context", "no bound" if size.context is None else f"{_value(size.context)} tokens"),
        ("vocabulary", f"{_value(manifest['vocab_size'])} tokens"),
        ("content hash", _code(manifest["content_hash"])),
        ("versions", ", ".join(_code(f"{name} {one}") for name, one in sorted(manifest["versions"].items()))),
    ]
    if manifest["git_revision"] is not None:
        rows.append(("revision of the code", _code(manifest["git_revision"])))
    if manifest["reward_log_tie"] is not None:
        rows.append(("log nu of ties (Davidson 1970)", _value(manifest["reward_log_tie"])))
    return _table(("", ""), rows)


def _snippet(manifest: Mapping[str, Any], size: Size) -> str:
    if manifest["kind"] != "policy":
        shift, scale = manifest["reward_shift"] or 0.0, manifest["reward_scale"] or 1.0
        return _CLASSIFIER.format(shift=float(shift), scale=float(scale))
    prompt = _BEGINNING if manifest["stage"] == "pretrain" else _QUESTION
    return _LANGUAGE_MODEL.format(prompt=prompt, max_new_tokens=min(64, (size.context or 128) // 2))


def _data(data: Mapping[str, Any]) -> str:
    rows = []
    for name, one in sorted(data.items()):
        counts = ", ".join(f"{_code(key)} {_value(count)}" for key, count in _flat(one["counts"]) if count)
        rows.append((_code(name), _code(one["fingerprint"]), counts))
    return _table(("set", "fingerprint", "counts other than 0"), rows) if rows else "None is recorded."


def _metrics(metrics: Mapping[str, Any]) -> str:
    bounds = {name: (f"{name}_low", f"{name}_high") for name in metrics}
    intervals = {
        name: " to ".join(_value(metrics[one]) for one in both)
        for name, both in bounds.items()
        if {*both} <= metrics.keys()
    }
    names = sorted(metrics.keys() - {one for name in intervals for one in bounds[name]})
    rows = [(_code(name), _value(metrics[name]), intervals.get(name, "")) for name in names]
    return _table(("metric", "value", "95 % interval"), rows) if rows else "None is recorded."


def _training(config: Mapping[str, Any]) -> str:
    left = dict(_flat(config))
    rows = []
    for pattern in FIGURES.split():
        for key in [key for key in left if fnmatchcase(key, pattern)]:
            rows.append((_code(key), _code(left.pop(key))))
    whole = "The whole config is in `artifact.json`."
    return f"{_table(('', ''), rows)}\n\n{whole}" if rows else whole


def _lineage(parents: Mapping[str, Any], ancestors: Mapping[str, Mapping[str, Any]]) -> str:
    lines = list(_lines(parents, ancestors, set(), 0))
    return "\n".join(lines) if lines else "It began from scratch."


def _lines(
    parents: Mapping[str, Any], ancestors: Mapping[str, Mapping[str, Any]], seen: set[str], depth: int
) -> Iterable[str]:
    """One bullet a parent, with its own parents below it where it is met first: it may be there on several ways."""
    for role, one in sorted(parents.items()):
        digest = one["content_hash"]
        start = f"{'  ' * depth}- {_code(role)}: {_code(one['path'])}"
        if digest is None:
            yield f"{start}, a model that is no artifact"
        elif digest in seen:
            yield f"{start}, {_code(digest)}, as above"
        elif digest not in ancestors:
            yield f"{start}, {_code(digest)}, which was not there to be read"
        else:
            seen.add(digest)
            found = ancestors[digest]
            made = f"{_plain(found.get('kind'))} of {_code('rlhf ' + str(found.get('stage')))}"
            yield f"{start}, {made}, {_code(digest)}"
            yield from _lines(found["parents"], ancestors, seen, depth + 1)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves as (dotted key, value), sorted; None is left out."""
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _plain(kind: Any) -> str:
    return re.sub(r"[^a-z]+", " ", str(kind).lower())


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _code(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _code(value: Any) -> str:
    """Somebody's text in one line, as code that says what it says and does nothing."""
    readable = "".join(c if c.isprintable() else " " for c in redact_text(str(value)))
    text = " ".join(readable.split()) or '""'
    if not set(text) & set("`|\\"):
        return f"`{text}`"
    # Within backticks none of these can be escaped in a way that every renderer reads alike.
    return f"<code>{''.join(c if c.isalnum() or c in ' ./:=,-' else f'&#{ord(c)};' for c in text)}</code>"
