"""A finished policy's tokenizer with its chat template, and by hash what it is. Its weights: `models.ready`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.schema import ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data import tokenizer as tokenizing
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import sha256
from rlhf_pipeline.models.ready import check_folder


def open_renderer(model: ReadyModelConfig, tokenizer: TokenizerConfig) -> Renderer:
    """The model's tokenizer, or the one that is named, with its chat template.

    Raises:
        UserError: where there is none; for a base model without a template, with what to set.
    """
    assert model.path is not None, "the config check lets no such config pass"
    check_folder(model.path)
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
