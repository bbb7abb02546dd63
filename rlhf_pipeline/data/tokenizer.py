"""Opens a tokenizer, or trains a byte-level BPE one for machines that cannot download any."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

from rlhf_pipeline import runtime
from rlhf_pipeline.config import config_dir
from rlhf_pipeline.config.schema import TokenizerConfig
from rlhf_pipeline.data.prompts import Renderer, load_template
from rlhf_pipeline.errors import UserError

_log = logging.getLogger(__name__)

SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
# The turn markers of conf/templates/chatml.jinja, so that a model of ours can be fine-tuned with either template.
TURN_TOKENS = ["<|im_start|>", "<|im_end|>"]


def open_tokenizer(path: str, config: TokenizerConfig, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id, with `config.template` in place of its own where one is named.

    Raises:
        UserError: when there is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    if trust_remote_code and runtime.is_main():
        _log.warning("%s: trust_remote_code is on: Python code that comes with this model is run", path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of every kind: what is wrong with somebody's files, or not there
        said = str(error).strip().replace("\n", " ")[:300]
        reason = said if isinstance(error, OSError) else f"{type(error).__name__}: {said}; are its files damaged?"
        raise UserError(
            f"{path}: no tokenizer can be opened there; name one with tokenizer.path=... ({reason})"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no fast version, which is needed to find where a response begins")
    return with_template(tokenizer, config)


def open_renderer(path: str, config: TokenizerConfig, *, trust_remote_code: bool = False) -> Renderer:
    """The renderer of the tokenizer that `open_tokenizer` opens.

    Raises:
        UserError: see `open_tokenizer`; for a chat template that is missing or unfit.
    """
    tokenizer = open_tokenizer(path, config, trust_remote_code=trust_remote_code)
    try:
        return Renderer(tokenizer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def with_template(tokenizer: Any, config: TokenizerConfig) -> Any:
    """Give the tokenizer the chat template that the config names, if it names one."""
    if config.template is not None:
        tokenizer.chat_template = load_template(config.template, config_dir())
    return tokenizer


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, context: int) -> Any:
    """A byte-level BPE tokenizer (Radford et al. 2019, section 2.2) whose pad, BOS and EOS are three tokens.

    Training is deterministic: merges are ordered by count, then by first appearance in the alphabet's order.

    Raises:
        UserError: when `vocab_size` leaves no room for merges beyond bytes and special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL_TOKENS.values(), *TURN_TOKENS]
    if vocab_size <= 256 + len(special):
        raise UserError(
            f"model.shape.vocab_size={vocab_size}: bytes and special tokens alone take {256 + len(special)}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context,
        additional_special_tokens=TURN_TOKENS,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def with_own_pad(tokenizer: Any, end_ids: tuple[int, ...]) -> Any:
    """A copy whose padding token is none that an answer can end with: transformers reads a reward at the last token that
    is not padding. Its own where it is fit, else another special token, else one more.
    """
    copied = copy.deepcopy(tokenizer)
    # Special tokens come from the chat template alone; the one for unknown words comes from text as well.
    special = {i: token.content for i, token in sorted(copied.added_tokens_decoder.items()) if token.special}
    free = [name for i, name in special.items() if i not in end_ids and name != copied.unk_token]
    if copied.pad_token not in free:
        # Setting `pad_token` alone would leave one that is not there without an id.
        copied.add_special_tokens({"pad_token": free[0] if free else SPECIAL_TOKENS["pad_token"]})
    return copied
