"""Opens finished policies, to be sampled from or to rate responses over packed trees; their tokens and lengths.

What training starts from: `models.load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline import artifact
from rlhf_pipeline.config.schema import Attention, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data.tokenizer import open_tokenizer
from rlhf_pipeline.errors import UserError, cannot_open
from rlhf_pipeline.models.load import best_attention
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import TreeModel


def open_model(config: ReadyModelConfig, tokenizer: Any, device: str) -> Any:
    """A causal language model in evaluation mode on `device`.

    Raises:
        UserError: when it cannot be found or opened, is no language model, or knows fewer tokens than the tokenizer.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = str(config.path)
    check_folder(path)
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


def open_policy(
    config: ReadyModelConfig, tokenizer: Any, device: torch.device, *, attention: Attention = Attention.auto
) -> TreeModel:
    """A finished policy in evaluation mode on `device`, over packed trees, checked.

    Raises:
        UserError: when it cannot be opened, or cannot run packed trees.
    """
    inner = open_model(config, tokenizer, str(device)).requires_grad_(False)
    policy = TreeModel(inner).eval()
    policy.use_attention(best_attention(attention, policy, device, dropout=0.0))
    self_check(policy, device)
    return policy


def check_same_words(policy: Any, reference: str, config: TokenizerConfig) -> None:
    """Refuse a reference to which the policy's tokens are other words. Tokens that the policy has more are no matter.

    Args:
        policy: its tokenizer.

    Raises:
        UserError: naming a token that differs.
    """
    ours = policy.get_vocab()
    theirs = open_tokenizer(reference, config).get_vocab()
    other = next((token for token, number in theirs.items() if ours.get(token) != number), None)
    if other is not None:
        raise UserError(
            f"its tokenizer is another one ({other!r} is no token of the policy's, or has another number), so that the two "
            "cannot rate the same tokens; name the model that the policy was trained from with reference=..."
        )


def context_of(path: str) -> int | None:
    """Tokens of a prompt and its answer that a model was built for; None where that is not bounded."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError):  # whoever opens the model says what is wrong with it
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_folder(path: str) -> None:
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
