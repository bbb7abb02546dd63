"""Opens a finished model to be sampled from, and says by hash what it is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.schema import ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data import tokenizer as tokenizing
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.errors import UserError, cannot_open
from rlhf_pipeline.files import sha256


def open_renderer(model: ReadyModelConfig, tokenizer: TokenizerConfig) -> Renderer:
    """The model's tokenizer, or the one that is named, with its chat template.

    Raises:
        UserError: where there is none; for a base model without a template, with what to set.
    """
    assert model.path is not None, "the config check lets no such config pass"
    _check_folder(model.path)
    source = tokenizer.path or model.path
    return tokenizing.open_renderer(source, tokenizer, trust_remote_code=model.trust_remote_code)


def content_hash(model: ReadyModelConfig) -> str:
    """What identifies the weights: of an artifact its content hash, of a folder that of its files, else id and revision.

    Raises:
        UserError: for a damaged artifact, or one that is no policy.
    """
    assert model.path is not None
    if artifact.is_artifact(model.path):
        return artifact.load(model.path, kind=Kind.policy).content_hash
    folder = Path(model.path)
    if not folder.is_dir():
        return f"{model.path}@{model.revision or 'main'}"
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".bin", ".json", ".model") and file.is_file()
    ]
    try:
        return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"model.path={model.path}: {error.filename}: cannot be read: {error.strerror}") from error


def open_model(config: ReadyModelConfig, tokenizer: Any, device: str) -> Any:
    """A causal language model in evaluation mode on `device`.

    Raises:
        UserError: when it cannot be found or opened, is no language model, or knows fewer tokens than the tokenizer.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = str(config.path)
    _check_folder(path)
    options: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "dtype": config.dtype.value if config.dtype else "auto",
        "output_loading_info": True,
    }
    if not Path(path).is_dir():
        options["revision"] = config.revision
    try:
        loaded: Any
        try:
            loaded = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "attention" not in str(error):
                raise
            loaded = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)
    except Exception as error:
        raise cannot_open(path, "causal language model", error) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise UserError(
            f"model.path={path}: holds no whole causal language model: {missing[0]} is missing"
            + (f" and {len(missing) - 1} more weights" if missing[1:] else "")
            + "; is it a reward model, or a body without its head?"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"tokenizer: it has {len(tokenizer)} tokens and the model has embeddings for {vocabulary}; "
            "use the tokenizer the model was trained with"
        )
    return model.eval().to(device)


def _check_folder(path: str) -> None:
    """A path that looks like one of this disk, and is none, is not searched for on the hub."""
    folder = Path(path)
    if folder.is_dir():
        if (
            artifact.is_artifact(folder)
            or (folder / "config.json").is_file()
            or (folder / "adapter_config.json").is_file()
        ):
            return
        inside = folder / "artifact"
        hint = f"; did you mean {inside}?" if artifact.is_artifact(inside) else ""
        raise UserError(f"model.path={path}: no model in this folder (config.json is not there){hint}")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or (folder.parent != Path() and folder.parent.is_dir()):
        raise UserError(f"model.path={path}: there is no such folder")
