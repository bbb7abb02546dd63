"""The forms an answer can be asked for, and whether it has the form."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_pipeline.data.lab.lexicon import COLOURS, NUMBERS
from rlhf_pipeline.data.lab.reading import Mark, bare, sentences, words

_LIST = re.compile(r"[A-Za-z ]+(?:, [A-Za-z ]+)*?(?: and [A-Za-z ]+)?[.!]")
_LETTER = re.compile(r"Dear [A-Z][a-z]+, [^.!?]+[.!] Yours, [A-Z][a-z]+\.")

# Words after which a sentence cannot be over.
OPEN = {
    *words("a an the of to at as and or with for near from but not that your me about will can could cannot"),
    *words("has have is are am does keeps likes lives works owns belongs feels said"),
    *words("went bought found got gave sold sent"),
}

# What a prompt may say of the form, and the kind of form that is meant.
REQUESTS = {
    "Answer in one word.": "word",
    "One word, please.": "word",
    "Answer in a sentence.": "sentence",
    "Use a whole sentence.": "sentence",
}


@dataclass(frozen=True, slots=True)
class Form:
    """`kind` is one of word, phrase, sentence, reply, list, capitals, letter; `count` sentences or items; `most` words."""

    kind: str
    count: int = 1
    most: int = 30


def follows(form: Form, answer: str) -> Mark:
    """Whether the answer has the form, 0 or 1; a list of another length counts a half."""
    said, parts = words(answer), sentences(answer)
    if form.kind == "word":
        return _mark(len(said) == 1, "one word")
    if form.kind == "list":
        return _list(form.count, answer)
    if form.kind == "capitals":
        return _mark(len(said) > 1 and answer == answer.upper() and len(parts) == 1, "capital letters")
    if form.kind == "letter":
        return _mark(bool(_LETTER.fullmatch(answer.strip())), "a letter from Dear to Yours")
    if len(said) > form.most:
        return Mark(0.0, f"it has {len(said)} words, more than {form.most}")
    if form.kind == "phrase":
        return _mark(
            len(parts) == 1 and len(said) >= 2 and "," not in answer, f"one phrase of at most {form.most} words"
        )
    if form.kind == "reply":
        return _mark(len(parts) <= form.count and len(said) >= 3 and is_over(answer), f"at most {form.count} sentences")
    whole = all(len(words(part)) >= 3 and not bare(part) and is_over(part) for part in parts)
    wanted = "one whole sentence" if form.count == 1 else f"{NUMBERS[form.count - 2]} whole sentences"
    return _mark(len(parts) == form.count and whole, wanted)


def is_over(part: str) -> bool:
    """Whether a sentence can end with its last word: not with `a`, nor with `the red`."""
    *before, last = words(part)
    return last not in OPEN and not (last in COLOURS and before and before[-1] in ("a", "the"))


def _mark(ok: bool, what: str) -> Mark:
    return Mark(1.0, f"it is {what}, as asked") if ok else Mark(0.0, f"it is not {what}, as asked")


def _list(count: int, answer: str) -> Mark:
    text = answer.strip()
    items = [item for item in re.split(r", | and ", text.rstrip(".!")) if item.strip()]
    if not _LIST.fullmatch(text) or any(len(words(item)) > 3 for item in items):
        return Mark(0.0, "it is not a list with commas")
    if len(items) == count:
        return Mark(1.0, f"it is a list of {count}")
    return Mark(0.5, f"it is a list of {len(items)}, not of {count}")
