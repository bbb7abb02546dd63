"""What one stage hands the next: a folder that transformers opens as it is, and `artifact.json`, written last.

The only file that knows an artifact's file names. Resume state is a different thing in a different folder (resume.py),
and what the model card says is made in card.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from rlhf_pipeline import card
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, is_intact, publish, read_small, sealed, sha256, write_json

FORMAT = 1
MANIFEST = "artifact.json"
ADAPTER = "adapter"
CARD = "README.md"  # of no checksum, nor of the content hash: people edit it, and the model stays what it is


class Kind(StrEnum):
    policy = "policy"
    reward_model = "reward_model"
    value_model = "value_model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A model or artifact that a stage started from."""

    path: str
    content_hash: str | None  # None for a plain Hugging Face folder or hub id
    template_hash: str | None = None
    tokenizer_hash: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """artifact.json."""

    kind: Kind
    stage: str
    step: int
    template_hash: str
    tokenizer_hash: str
    special_ids: dict[str, int | None]
    vocab_size: int
    config: dict[str, Any]  # resolved, secrets masked
    data: dict[str, Any]  # fingerprints and counts
    metrics: dict[str, float]
    parents: dict[str, Parent] = field(default_factory=dict)
    reward_shift: float | None = None  # reward models: consumers subtract it, then divide by the scale
    reward_scale: float | None = None
    reward_log_tie: float | None = None  # log nu of Davidson (1970), of reward models that model ties
    versions: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    files: dict[str, str] = field(default_factory=dict)  # name, of those in folders folder/name -> sha256
    content_hash: str = ""
    format: int = FORMAT


def save(
    path: Path,
    *,
    model: Any,
    weights: dict[str, Tensor],
    tokenizer: Any,
    manifest: dict[str, Any],
    adapter: Callable[[Path], None] | None = None,
    kept: str = "",
) -> Manifest:
    """Write an artifact; called by one process. `weights` is the full state dict, `manifest` the fields we do not know.

    `adapter` writes a peft adapter into the folder that it is given, beside the model that it is merged into.

    Raises:
        UserError: when the disk is full; an artifact that was at `path` stays.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors("the artifact", path, kept=kept or "Training state is intact."):
        partial.mkdir(parents=True)
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        if adapter is not None:
            adapter(partial / ADAPTER)
        files = {str(f.relative_to(partial)): sha256(f) for f in sorted(partial.rglob("*")) if f.is_file()}
        complete = Manifest(
            **manifest,
            versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed")},
            git_revision=_git_revision(),
            files=files,
            content_hash=_content_hash(files),
        )
        said = asdict(complete)
        (partial / CARD).write_text(_card(said, model=model, weights=weights, folder=partial), encoding="utf-8")
        write_json(partial / MANIFEST, sealed(said))
        publish(partial, path)
    return complete


def link(source: Path, target: Path) -> None:
    """Make `target` the same artifact as `source` without its bytes a second time, where hard links can be made."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors("the artifact", target, kept=f"{source} is intact."):
        shutil.copytree(source, partial, copy_function=_link_or_copy)
        publish(partial, target)


def load(path: str | Path, *, kind: Kind | tuple[Kind, ...]) -> Manifest:
    """Check an artifact, which must be of (one of) the kind, and return its manifest.

    Raises:
        UserError: for a missing, unfinished or damaged artifact, or one of another kind; says which, and what to do.
    """
    folder = Path(path)
    again = "run the stage that makes it again"
    try:
        raw = json.loads(read_small(folder / MANIFEST))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no {MANIFEST} in it, so no finished artifact; run the stage that makes it to its end"
        ) from None
    except OSError as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST}: not valid JSON ({error}); {again}") from None
    if isinstance(raw, dict) and raw.get("format") != FORMAT:
        raise UserError(
            f"{folder}: artifact format {raw.get('format')}, this version reads {FORMAT}; install the version that wrote it"
        )
    intact = isinstance(raw, dict) and is_intact(raw)  # told last: other messages say more
    if wrong := _faults(raw):
        raise UserError(f"{folder / MANIFEST}: not a whole manifest: {wrong}; {again}")
    for name, digest in raw["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; copy the whole folder, or {again}")
        try:
            differs = sha256(folder / name) != digest
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read: {error.strerror}") from error
        if differs:
            raise UserError(
                f"{folder}: {name} is damaged (its checksum differs); copy it afresh, or run the stage again"
            )
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if raw["kind"] not in kinds:
        raise UserError(
            f"{folder}: is a {raw['kind']} (made by rlhf {raw['stage']}), and a "
            f"{' or a '.join(one.value for one in kinds)} is needed here"
        )
    if raw["content_hash"] != _content_hash(raw["files"]):  # or none could be asked for by leaving it out
        raise UserError(f"{folder / MANIFEST}: its content_hash is not that of its files; {again}")
    if not intact:
        raise UserError(
            f"{folder}: {MANIFEST} is damaged (its checksum differs); copy it afresh, or run the stage again"
        )
    parents = {name: Parent(**parent) for name, parent in raw.pop("parents").items()}
    known = {one.name for one in fields(Manifest)}
    return Manifest(**{**{k: v for k, v in raw.items() if k in known}, "kind": Kind(raw["kind"]), "parents": parents})


_HASH = (str, NoneType)
_SHAPE: dict[str, tuple[type, ...]] = {  # of a manifest's fields, those that other code relies on
    "kind": (str,), "stage": (str,), "step": (int,), "template_hash": (str,), "tokenizer_hash": (str,),
    "special_ids": (dict,), "vocab_size": (int,), "config": (dict,), "data": (dict,), "metrics": (dict,),
    "parents": (dict,), "reward_shift": (int, float, NoneType), "reward_scale": (int, float, NoneType),
    "reward_log_tie": (int, float, NoneType), "versions": (dict,), "git_revision": _HASH, "files": (dict,),
    "content_hash": (str,),
}  # fmt: skip
_PARENT: dict[str, tuple[type, ...]] = {"path": (str,), "content_hash": _HASH, "template_hash": _HASH,
                                        "tokenizer_hash": _HASH}  # fmt: skip


def _faults(raw: Any) -> str:
    """What is wrong with the content of an artifact.json; empty where it is as `save` writes it."""
    if not isinstance(raw, dict):
        return f"it is a {type(raw).__name__}"
    raw.setdefault("reward_log_tie", None)  # came later than the others
    for name, types in _SHAPE.items():
        if name not in raw:
            return f"{name!r} is missing"
        if not isinstance(raw[name], types):
            return f"{name!r} is {raw[name]!r:.60}"
    for name, digest in raw["files"].items():
        if not isinstance(digest, str) or Path(name).is_absolute() or {"", ".", ".."} & {*name.split("/")}:
            return f"{name!r:.60} is no name of a file in it"
    for name, one in raw["parents"].items():
        if not isinstance(one, dict) or one.keys() != _PARENT.keys():
            return f"the parent {name!r} is {one!r:.60}"
        if any(not isinstance(one[key], types) for key, types in _PARENT.items()):
            return f"the parent {name!r} is {one!r:.60}"
    return ""


def is_artifact(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def is_whole(path: Path) -> bool:
    """Whether it is an artifact, whatever its kind, that is as it was written."""
    try:
        load(path, kind=tuple(Kind))
    except UserError:
        return False
    return True


def parent(path: str, *, kind: Kind | tuple[Kind, ...]) -> Parent:
    """`path` as another artifact's parent; a plain Hugging Face folder or a hub id is welcome as a root."""
    if not is_artifact(path):
        return Parent(path=path, content_hash=None)
    manifest = load(path, kind=kind)
    return Parent(
        path=path,
        content_hash=manifest.content_hash,
        template_hash=manifest.template_hash,
        tokenizer_hash=manifest.tokenizer_hash,
    )


def require_same(parents: dict[str, Parent]) -> None:
    """Refuse parents that speak different languages.

    Raises:
        UserError: naming the two whose chat template or tokenizer differ.
    """
    for what in ("template_hash", "tokenizer_hash"):
        seen: dict[str, str] = {}
        for name, one in parents.items():
            value = getattr(one, what)
            other = next((n for v, n in seen.items() if v != value), None)
            if value is not None and other is not None:
                raise UserError(
                    f"{other} ({parents[other].path}) and {name} ({one.path}) have different "
                    f"{'chat templates' if what == 'template_hash' else 'tokenizers'}; train both from the same base"
                )
            if value is not None:
                seen[value] = name


def _card(manifest: dict[str, Any], *, model: Any, weights: dict[str, Tensor], folder: Path) -> str:
    from safetensors import safe_open

    parameters = 0  # of the files: the state dict has a tied tensor twice
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    size = card.Size(
        parameters=parameters,
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})),
        context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    lineage = ancestors(manifest["parents"])
    base = card.root(manifest, lineage)
    on_hub = base is not None and not Path(base).exists()
    return card.model_card(manifest, size=size, ancestors=lineage, base_model=base if on_hub else None)


def ancestors(direct: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Manifests of all that a model came from, by content hash, where they still are what they were; perhaps others."""
    found: dict[str, dict[str, Any]] = {}
    left = list(direct.values())
    while left:
        one = left.pop()
        try:
            raw = json.loads(read_small(Path(one["path"]) / MANIFEST))
            parents = list(raw["parents"].values())
            whole = all(isinstance(p["path"], str) and isinstance(p["content_hash"], str | None) for p in parents)
            if whole and raw["content_hash"] not in found:  # by its own: one made anew is not what a child names
                found[raw["content_hash"]] = raw
                left += parents
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # a folder without one, or anything else: a run is not to end for its card
    return found


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _content_hash(files: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(files.items())).encode()).hexdigest()


def _git_revision() -> str | None:
    repository = Path(__file__).resolve().parents[1]
    if not (repository / ".git").exists():  # an installed wheel
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
