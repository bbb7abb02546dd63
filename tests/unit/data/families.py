"""Chat templates as public model families have them, and what they should come to.

The templates write the published text formats in our own words. Beside each stands the format as plain strings,
from which `written` builds the expected text without Jinja and without the renderer. Tokenizers are trained here:
small, but of the families' kinds and with their special tokens.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_pipeline.data.records import Message

CORPUS = [
    "user: how are you today? assistant: I am well, thank you. The sky is blue and the grass is green.",
    "system\nBe kind.\n\nHuman: naïve café, 日本語 and emoji 🙂\n\nAssistant: model output [INST] [/INST]",
] * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A format: `start`, then head + content + tail for each message.

    The assistant's content stands between `lead` and `end`, and all three are the response; `after` is what follows
    it where the conversation goes on.
    """

    template: str  # Jinja, or the name of a shipped one
    kind: str  # of the tokenizer, see `_train`
    bos: str | None
    end: str  # the special token that ends a turn
    eos: str | None = None  # the tokenizer's, where it is another one
    control: tuple[str, ...]  # all special tokens
    start: str = ""
    heads: dict[str, str]
    tails: dict[str, str] = field(default_factory=dict)
    lead: str = ""
    after: str = ""
    strips: bool = True  # white space around contents
    default_system: str | None = None
    has_system: bool = True
    must_alternate: bool = False
    swallows_space: bool = False  # its turn tokens take the white space after them with them (rstrip)

    def refuses(self, messages: Sequence[Message]) -> bool:
        roles = [message.role for message in messages]
        if "system" in roles and not self.has_system:
            return True
        return self.must_alternate and roles != [("user", "assistant")[i % 2] for i in range(len(roles))]

    def written(self, messages: Sequence[Message], *, prompt: bool) -> list[tuple[str, bool, bool]]:
        """(text, whether it is somebody's content, whether it is scored) of all parts, in order."""
        parts = [(self.start, False, False)]
        if self.default_system is not None and messages[0].role != "system":
            messages = [Message("system", self.default_system), *messages]
        for message in messages:
            content = message.content.strip() if self.strips else message.content
            parts.append((self.heads[message.role], False, False))
            if message.role == "assistant":
                parts += [(self.lead, False, message.scored), (content, True, message.scored)]
                parts += [(self.end, False, message.scored), (self.after, False, False)]
            else:
                parts += [(content, True, False), (self.tails[message.role], False, False)]
        if prompt:
            parts.append((self.heads["assistant"], False, False))
        else:
            parts.pop()  # nothing follows the last answer
        return [part for part in parts if part[0]]

    def plain(self, text: str) -> str:
        """A text without the differences that the family's tokenizer does not keep."""
        if self.kind == "bytes_nfc":
            return unicodedata.normalize("NFC", text)
        if self.kind.startswith("pieces"):
            text = text.replace("▁", " ")
        control = "|".join(map(re.escape, self.control))
        if self.kind == "pieces_always":  # puts a space after each control token
            text = re.sub(f"({control}) ", r"\1", text)
        return re.sub(rf"({control})\s+", r"\1", text) if self.swallows_space else text


def _markers(mark: str) -> dict[str, str]:
    return {role: mark.format(role) for role in ("system", "user", "assistant")}


def _tails(tail: str) -> dict[str, str]:
    return {"system": tail, "user": tail}


_LLAMA3 = """
{%- for m in messages -%}
    {%- set head = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' -%}
    {{- (bos_token if loop.first else '') + head + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""
_INST = """
{{- bos_token -}}
{%- for m in messages -%}
    {%- if m.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
    {%- if m.role == 'user' -%}{{- '[INST] ' + m.content | trim + ' [/INST]' -}}
    {%- else -%}{{- ' ' + m.content | trim + eos_token -}}{%- endif -%}
{%- endfor -%}"""
LLAMA2 = _INST.replace("{{- bos_token -}}", "").replace("{{- '[INST]", "{{- bos_token + '[INST]")
_ZEPHYR = """
{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"""
_GEMMA = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}
{%- for m in messages -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
    {%- set role = 'model' if m.role == 'assistant' else m.role -%}
    {{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""
_QWEN = """
{%- for m in messages -%}
    {%- if loop.first and m.role != 'system' -%}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
_PHI3 = """
{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

_OURS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
FAMILIES: dict[str, Family] = {
    "dialogue": Family(
        template="dialogue", kind="bytes", bos="<|bos|>", end="<|eos|>", control=_OURS, start="<|bos|>",
        heads={"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant:"}, tails=_tails(""), lead=" ",
    ),
    "chatml": Family(
        template="chatml", kind="bytes", bos="<|bos|>", end="<|im_end|>", eos="<|eos|>", control=_OURS,
        start="<|bos|>", heads=_markers("<|im_start|>{}\n"), tails=_tails("<|im_end|>\n"), after="\n",
    ),
    "llama3": Family(
        template=_LLAMA3, kind="bytes", bos="<|begin_of_text|>", end="<|eot_id|>", eos="<|end_of_text|>",
        control=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        start="<|begin_of_text|>", heads=_markers("<|start_header_id|>{}<|end_header_id|>\n\n"),
        tails=_tails("<|eot_id|>"),
    ),
    "mistral": Family(
        template=_INST, kind="pieces_always", bos="<s>", end="</s>", control=("<unk>", "<s>", "</s>"), start="<s>",
        heads={"user": "[INST] ", "assistant": ""}, tails={"user": " [/INST]"}, lead=" ",
        has_system=False, must_alternate=True,
    ),
    "zephyr": Family(
        template=_ZEPHYR, kind="pieces_first", bos="<s>", end="</s>", control=("<unk>", "<s>", "</s>"),
        heads=_markers("<|{}|>\n"), tails=_tails("</s>\n"), after="\n", strips=False,
    ),
    "gemma": Family(
        template=_GEMMA, kind="pieces_never", bos="<bos>", end="<end_of_turn>", eos="<eos>",
        control=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), start="<bos>",
        heads={"user": "<start_of_turn>user\n", "assistant": "<start_of_turn>model\n"},
        tails={"user": "<end_of_turn>\n"}, after="\n", has_system=False, must_alternate=True,
    ),
    "qwen": Family(
        template=_QWEN, kind="bytes_nfc", bos=None, end="<|im_end|>",
        control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), heads=_markers("<|im_start|>{}\n"),
        tails=_tails("<|im_end|>\n"), after="\n", strips=False, default_system="You are a helpful assistant.",
    ),
    "phi3": Family(
        template=_PHI3, kind="pieces_first", bos="<s>", end="<|end|>", eos="<|endoftext|>", swallows_space=True,
        control=("<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        heads=_markers("<|{}|>\n"), tails=_tails("<|end|>\n"), after="\n", strips=False,
    ),
}  # fmt: skip


def make_tokenizer(family: Family, template: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer with the family's special tokens and the Jinja text `template`."""
    backend = Tokenizer.from_str(_train(family.kind))
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=family.swallows_space) for token in family.control]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos or family.end,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def _train(kind: str) -> str:
    """A tokenizer as JSON. "bytes" works on bytes as GPT-2's; "bytes_nfc" normalises first, as Qwen's.

    "pieces_*" are like SentencePiece: spaces are written as ▁ and rare characters as bytes. A ▁ is put before every
    text ("first"), before everything that follows a special token too ("always", as Llama 2 had it), or never.
    """
    name, _, variant = kind.partition("_")
    tokenizer = Tokenizer(models.BPE(byte_fallback=name == "pieces"))
    if name == "bytes":
        tokenizer.normalizer = normalizers.NFC() if variant == "nfc" else None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=variant, split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=variant), decoders.ByteFallback()])
        alphabet = [chr(i) for i in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    if name == "pieces":
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return json.dumps(state)
