"""The table of formats: which fields a row of each has, and which records can be made of it.

Readers take a row apart (`conversations`, `comparisons`); here stands what can be made of what they find. A new format
is an entry of FORMATS. Content is checked by the records. Use it through `formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypedDict, get_args

from rlhf_pipeline.data import comparisons, conversations
from rlhf_pipeline.data.comparisons import Answers, Verdict
from rlhf_pipeline.data.conversations import Messages, context
from rlhf_pipeline.data.fields import SHAPES, Fields, string
from rlhf_pipeline.data.records import BadRow, Demonstration, Feedback, Message, Prompt, Ranking, Record, Text

Kind = Literal["text", "demonstration", "ranking", "feedback", "prompt"]
Adapter = Callable[[Fields], Record | list[Record]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """The fields a row must have, and what makes a record of each kind from it; None where nothing can.

    `fields` gives the shape of each, a key of SHAPES, by which it is recognised.
    """

    fields: Mapping[str, str]
    description: str
    optional: tuple[str, ...] = ()  # fields that are read where they are there
    named_only: bool = False  # never recognised: data.format must say so
    text: Adapter | None = None
    demonstration: Adapter | None = None
    ranking: Adapter | None = None
    feedback: Adapter | None = None
    prompt: Adapter | None = None

    def adapter(self, kind: Kind) -> Adapter | None:
        assert kind in get_args(Kind), kind
        return getattr(self, kind)

    def unfit(self, row: Fields) -> list[str]:
        """The fields that the row lacks or has in another shape."""
        return [name for name, shape in self.fields.items() if name not in row or not SHAPES[shape](row[name])]


# What can be made of what a reader finds


class _Makes(TypedDict, total=False):
    """Adapters by kind, to be spread into a Format."""

    demonstration: Adapter
    ranking: Adapter
    feedback: Adapter
    prompt: Adapter


def _conversation(read: Callable[[Fields], Messages]) -> _Makes:
    """A demonstration; without its last answer it is a prompt."""

    def prompt(row: Fields) -> Prompt:
        messages = read(row)
        return Prompt(context(messages[:-1] if messages and messages[-1].role == "assistant" else messages))

    return {"demonstration": lambda row: Demonstration(read(row)), "prompt": prompt}


def _answers(read: Callable[[Fields], Answers]) -> _Makes:
    """A ranking; its best answer is a demonstration, the best are also wanted answers and the worst unwanted ones."""
    return {
        "ranking": lambda row: _ranking(read(row)),
        "demonstration": lambda row: _best(read(row)),
        "feedback": lambda row: _extremes(read(row)),
        "prompt": lambda row: Prompt(read(row).prompt),
    }


def _each(read: Callable[[Fields], list[Answers]]) -> _Makes:
    """As `_answers`, of a row with several questions."""
    return {
        "ranking": lambda row: [_ranking(found) for found in read(row)],
        "demonstration": lambda row: [_best(found) for found in read(row)],
        "prompt": lambda row: [Prompt(found.prompt) for found in read(row)],
    }


def _ranking(found: Answers) -> Ranking:
    return Ranking(found.prompt, found.responses, found.ranks, found.scores)


def _extremes(found: Answers) -> list[Record]:
    """What is between the best and the worst is left out: nobody said that it was wanted, or that it was not."""
    best, worst = min(found.ranks), max(found.ranks)
    if best == worst:
        raise BadRow("a tie says of no answer that it was wanted")
    chosen = [(text, rank) for text, rank in zip(found.responses, found.ranks, strict=True) if rank in (best, worst)]
    return [Feedback(found.prompt, text, rank == best) for text, rank in chosen]


def _best(found: Answers) -> Demonstration:
    """The best answer, the first of several. Only it is learned: earlier ones stand before all alike, nobody chose them."""
    if not found.responses:
        raise BadRow("fewer than two responses")
    return Demonstration((*found.prompt, Message("assistant", found.responses[found.ranks.index(0)])))


def _pair(read: Callable[[Fields], Answers]) -> _Makes:
    """As `_answers`. A row may say by how much the one is better."""
    return _answers(comparisons.with_margin(read))


def _verdict(read: Callable[[Fields], Verdict]) -> _Makes:
    """Feedback on an answer, which is a demonstration where it was wanted."""

    def feedback(row: Fields) -> Feedback:
        found = read(row)
        return Feedback(found.prompt, found.response, found.desirable)

    def demonstration(row: Fields) -> Demonstration:
        found = read(row)
        if not found.desirable:
            raise BadRow("the answer was not wanted")
        return Demonstration((*found.prompt, Message("assistant", found.response)))

    return {"feedback": feedback, "demonstration": demonstration, "prompt": lambda row: Prompt(read(row).prompt)}


def _prompt(read: Callable[[Fields], Messages]) -> _Makes:
    return {"prompt": lambda row: Prompt(read(row))}


def _text(row: Fields) -> Text:
    return Text(string(row, "text"))


def _hh_rejected(row: Fields) -> Demonstration:
    found = comparisons.hh(row)
    return Demonstration((*found.prompt, Message("assistant", found.responses[1])))


_MARGIN = (comparisons.MARGIN,)
_PAIR_SCORES = (*(name for names in comparisons.SCORES for name in names), "metadata", *_MARGIN)
_SYSTEM = ("system", "system_prompt")
_TASK = ("input", "history", *_SYSTEM)

# Order matters where a row fits several: the first one that makes the wanted kind is taken.
FORMATS: dict[str, Format] = {
    "text": Format(fields={"text": "a string"}, description="a document", text=_text),
    # Comparisons
    "hh_prompt": Format(
        fields={"prompt": "a dialogue up to Assistant:", "chosen": "a string", "rejected": "a string"},
        optional=_PAIR_SCORES,
        description="a dialogue of Human: and Assistant: turns and two ways to end it",
        **_pair(comparisons.hh_with_prompt),
    ),
    "hh": Format(
        fields={"chosen": "a dialogue", "rejected": "a dialogue"},
        optional=_PAIR_SCORES,
        description="whole dialogues of Human: and Assistant: turns",
        **_pair(comparisons.hh),
    ),
    "hh_rejected": Format(
        fields={"chosen": "a dialogue", "rejected": "a dialogue"},
        description="the same, the rejected answer as the demonstration",
        named_only=True,
        demonstration=_hh_rejected,
    ),
    "pair": Format(
        fields={
            "prompt": "a string or messages",
            "chosen": "a string or messages",
            "rejected": "a string or messages",
        },
        optional=(*_SYSTEM, *_PAIR_SCORES),
        description="a prompt and two answers (TRL, UltraFeedback)",
        **_pair(comparisons.pair_with_prompt),
    ),
    "openai_pair": Format(
        fields={"input": "an object with messages", "preferred_output": "messages", "non_preferred_output": "messages"},
        optional=_MARGIN,
        description="OpenAI's preference fine-tuning",
        **_pair(comparisons.openai_pair),
    ),
    "sharegpt_pair": Format(
        fields={"conversations": "turns", "chosen": "a string or message", "rejected": "a string or message"},
        optional=(*_SYSTEM, *_PAIR_SCORES),
        description="turns up to the question, and two answers (LLaMA-Factory)",
        **_pair(partial(comparisons.pair, read_prompt=conversations.sharegpt)),
    ),
    "messages_pair": Format(
        fields={"messages": "messages", "chosen": "a string or message", "rejected": "a string or message"},
        optional=_PAIR_SCORES,
        description="messages up to the question, and two answers",
        **_pair(partial(comparisons.pair, read_prompt=conversations.messages)),
    ),
    "conversation_pair": Format(
        fields={"chosen": "messages", "rejected": "messages"},
        optional=_PAIR_SCORES,
        description="two conversations that differ in the last message",
        **_pair(comparisons.conversation_pair),
    ),
    "alpaca_pair": Format(
        fields={"instruction": "a string", "chosen": "a string", "rejected": "a string"},
        optional=(*_TASK, *_PAIR_SCORES),
        description="a task and two answers (LLaMA-Factory)",
        **_pair(partial(comparisons.pair, read_prompt=conversations.instruction)),
    ),
    "question_pair": Format(
        fields={"question": "a string", "chosen": "a string", "rejected": "a string"},
        optional=(*_SYSTEM, *_PAIR_SCORES),
        description="a question and two answers (Orca)",
        **_pair(partial(comparisons.pair, read_prompt=partial(conversations.prompt, field="question"))),
    ),
    "text_pair": Format(
        fields={"chosen": "a string", "rejected": "a string"},
        optional=_PAIR_SCORES,
        description="two texts; the words that both begin with are the prompt (TRL's implicit prompt)",
        named_only=True,  # a prompt in a column of another name would be overlooked
        **_pair(comparisons.text_pair),
    ),
    "kwise": Format(
        fields={"prompt": "a string or messages", "responses": "strings", "scores": "numbers"},
        optional=("ranks", *_SYSTEM),
        description="a prompt and K answers with scores, higher is better",
        **_answers(comparisons.kwise),
    ),
    "kwise_ranks": Format(
        fields={"prompt": "a string or messages", "responses": "strings", "ranks": "numbers"},
        optional=("scores", *_SYSTEM),
        description="a prompt and K answers with ranks, lower is better",
        **_answers(comparisons.kwise),
    ),
    "ultrafeedback": Format(
        fields={"instruction": "a string", "completions": "objects"},
        description="UltraFeedback as published: completions with response and overall_score",
        **_answers(comparisons.ultrafeedback),
    ),
    "nectar": Format(
        fields={"prompt": "a dialogue up to Assistant:", "answers": "objects"},
        description="Nectar: answers with rank",
        **_answers(comparisons.nectar),
    ),
    "webgpt": Format(
        fields={"question": "an object", "answer_0": "a string", "answer_1": "a string", "score_0": "a number"},
        optional=("score_1", *_MARGIN),
        description="WebGPT's comparisons",
        **_pair(comparisons.webgpt),
    ),
    "summaries": Format(
        fields={"info": "an object", "summaries": "objects", "choice": "a number"},
        optional=_MARGIN,
        description="the summary comparisons of Stiennon et al. 2020",
        **_pair(comparisons.summaries),
    ),
    "shp": Format(
        fields={"history": "a string", "human_ref_A": "a string", "human_ref_B": "a string", "labels": "a number"},
        optional=_MARGIN,
        description="Stanford Human Preferences",
        **_pair(comparisons.shp),
    ),
    "safe_rlhf": Format(
        fields={
            "prompt": "a string",
            "response_0": "a string",
            "response_1": "a string",
            "better_response_id": "a number",
        },
        optional=_MARGIN,
        description="PKU-SafeRLHF, by helpfulness",
        **_pair(comparisons.safe_rlhf),
    ),
    "oasst_tree": Format(
        fields={"prompt": "an object with replies"},
        description="OpenAssistant's trees: a record of every question with ranked answers",
        **_each(comparisons.oasst_tree),
    ),
    # Verdicts; before demonstrations, so that answers nobody wanted are not learned by accident
    "messages_feedback": Format(
        fields={"messages": "messages", "label": "true or false"},
        description="a conversation, and whether its last answer was wanted",
        **_verdict(partial(comparisons.judged_conversation, read=conversations.messages)),
    ),
    "sharegpt_feedback": Format(
        fields={"conversations": "turns", "label": "true or false"},
        optional=_SYSTEM,
        description="the same of turns",
        **_verdict(partial(comparisons.judged_conversation, read=conversations.sharegpt)),
    ),
    "alpaca_feedback": Format(
        fields={"instruction": "a string", "output": "a string", "kto_tag": "true or false"},
        optional=_TASK,
        description="a task, the answer, and whether it was wanted (LLaMA-Factory)",
        **_verdict(partial(comparisons.judged_conversation, read=conversations.task, label="kto_tag")),
    ),
    "completion_feedback": Format(
        fields={"prompt": "a string or messages", "completion": "a string or messages", "label": "true or false"},
        optional=_SYSTEM,
        description="a prompt, one answer, and whether it was wanted (TRL)",
        **_verdict(comparisons.judged_completion),
    ),
    "response_feedback": Format(
        fields={"prompt": "a string or messages", "response": "a string", "label": "true or false"},
        optional=_SYSTEM,
        description="the same by another name",
        **_verdict(partial(comparisons.judged_completion, answer="response")),
    ),
    # Conversations
    "messages": Format(
        fields={"messages": "messages"},
        description="a list of {role, content}, optionally weight 0 or 1",
        **_conversation(conversations.messages),
    ),
    "sharegpt": Format(
        fields={"conversations": "turns"},
        optional=_SYSTEM,
        description="a list of {from, value}",
        **_conversation(conversations.sharegpt),
    ),
    "alpaca": Format(
        fields={"instruction": "a string", "output": "a string"},
        optional=_TASK,
        description="a task, optionally its input, and the answer",
        **_conversation(conversations.task),
    ),
    "dolly": Format(
        fields={"instruction": "a string", "response": "a string"},
        optional=("context", "history", *_SYSTEM),
        description="a task, optionally its context, and the answer",
        **_conversation(partial(conversations.task, extra="context", answer="response")),
    ),
    "hh_completion": Format(
        fields={"prompt": "a dialogue up to Assistant:", "completion": "a string"},
        description="a dialogue of Human: and Assistant: turns and its end",
        **_conversation(partial(conversations.answered_dialogue, answer="completion")),
    ),
    "hh_response": Format(
        fields={"prompt": "a dialogue up to Assistant:", "response": "a string"},
        description="the same by another name",
        **_conversation(partial(conversations.answered_dialogue, answer="response")),
    ),
    "prompt_response": Format(
        fields={"prompt": "a string or messages", "response": "a string or messages"},
        optional=_SYSTEM,
        description="two strings, or messages",
        **_conversation(partial(conversations.question_and_answer, question="prompt", answer="response")),
    ),
    "prompt_completion": Format(
        fields={"prompt": "a string or messages", "completion": "a string or messages"},
        optional=_SYSTEM,
        description="the same by another name (TRL)",
        **_conversation(partial(conversations.question_and_answer, question="prompt", answer="completion")),
    ),
    "question_response": Format(
        fields={"question": "a string", "response": "a string"},
        optional=_SYSTEM,
        description="a question and its answer (Orca)",
        **_conversation(partial(conversations.question_and_answer, question="question", answer="response")),
    ),
    "question_answer": Format(
        fields={"question": "a string", "answer": "a string"},
        optional=_SYSTEM,
        description="a question and its answer (GSM8K)",
        **_conversation(partial(conversations.question_and_answer, question="question", answer="answer")),
    ),
    "tldr": Format(
        fields={"query": "a string", "reference_responses": "a string"},
        description="a Reddit post and the summary that a person wrote (TL;DR)",
        **_conversation(conversations.tldr),
    ),
    "truthful_qa": Format(
        fields={"Question": "a string", "Best Answer": "a string"},
        description="TruthfulQA as published",
        **_conversation(partial(conversations.question_and_answer, question="Question", answer="Best Answer")),
    ),
    # Prompts alone
    "hh_prompt_only": Format(
        fields={"prompt": "a dialogue up to Assistant:"},
        description="a dialogue of Human: and Assistant: turns that waits for its end",
        **_prompt(conversations.dialogue_prompt),
    ),
    "real_toxicity": Format(
        fields={"prompt": "an object with text"},
        description="RealToxicityPrompts as published",
        **_prompt(conversations.prompt_text),
    ),
    "prompt": Format(
        fields={"prompt": "a string or messages"},
        optional=_SYSTEM,
        description="a string or messages",
        **_prompt(conversations.prompt),
    ),
    "opening": Format(  # only by name: beside a prompt, a text can be anything
        fields={"text": "a string"}, description="a document's beginning", named_only=True, prompt=conversations.opening
    ),
}
