"""A problem so small that its answers can be counted: what PPO should come to is known exactly.

The words are END, five more and nothing else; a response has at most two, and ends with END or is cut off. So a prompt
has 31 responses. A policy is a table of log-probabilities [P, C, V]: P prompts, C contexts (what was said so far), V
words; a distribution over responses is [P, N].

What is trained is read from its files by transformers alone, and what it should be is computed from the start and the
scores: neither shares code with the package.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

END, UNKNOWN, COLON = "<end>", "<unknown>", ":"
WORDS = [END, UNKNOWN, COLON, "a", "b", "c"]
LONGEST = 2
PROMPTS = ["a", "b c", "c"]
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% if message.role == 'user' %} : {% else %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
# 40 iterations of 384 episodes, four updates in each; the rate falls to 0, and so does the noise.
RUN = [
    "ppo",
    "model.path=start",
    "data.train=prompts.jsonl",
    "data.heldout=heldout.jsonl",
    "data.max_length=16",
    "data.max_prompt_length=8",
    "+rewards.chance.program=chance:scores",
    f"rollout.max_new_tokens={LONGEST}",
    "rollout.samples=8",
    "rollout.episodes=384",
    "batch.examples=96",
    "batch.row_length=1024",
    "train.epochs=100",
    "train.max_steps=40",
    "advantage.whiten=false",
    "optim.lr=1e-3",
    "optim.decay=cosine",
    "optim.final_lr_fraction=0",
    "optim.warmup_steps=3",
    "value.init=policy",
    "value.optim.lr=2e-3",
    "value.optim.warmup_steps=0",
    "value.clip=null",
    "ema.decay=0",
    "engine=zero0",
    "evaluation.before=false",
    "evaluation.every=0",
    "evaluation.samples=0",
    "checkpoint.every=1000",
    "checkpoint.artifact_every_epoch=false",
    "runtime.threads=1",
    "tracking.progress=false",
]
SCORER = '''"""A random score for each (prompt, response, finished), the same at every call."""

import random


def score(prompt, response, finished):
    return random.Random(f"{prompt}|{response}|{finished}").gauss(0, 1)


def scores(episodes):
    return [score(one.prompt[-1].content, one.response, one.finished) for one in episodes]
'''


@dataclass(frozen=True)
class Responses:
    """All that can be said, by numbers of words; the first is END alone."""

    said: tuple[tuple[int, ...], ...]  # [N]
    contexts: tuple[tuple[int, ...], ...]  # [C], shorter ones first

    @classmethod
    def all(cls) -> Responses:
        others = range(1, len(WORDS))
        contexts = tuple(one for length in range(LONGEST) for one in product(others, repeat=length))
        ended = [(*one, 0) for one in contexts]
        return cls(tuple(ended) + tuple(product(others, repeat=LONGEST)), contexts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Words of each with its END, [N]."""
        return np.array([len(one) for one in self.said])

    @cached_property
    def finished(self) -> np.ndarray:
        return np.array([one[-1] == 0 for one in self.said])

    @cached_property
    def passed(self) -> np.ndarray:
        """Whether a response says word v in context c, bool [N, C, V]."""
        number = {one: c for c, one in enumerate(self.contexts)}
        found = np.zeros((len(self.said), len(self.contexts), len(WORDS)), bool)
        for n, one in enumerate(self.said):
            for t, word in enumerate(one):
                found[n, number[one[:t]], word] = True
        return found

    def logprobs(self, table: np.ndarray) -> np.ndarray:
        """[P, C, V] -> [P, N]."""
        return np.einsum("pcv,ncv->pn", table, self.passed)


RESPONSES = Responses.all()


@dataclass(frozen=True)
class Problem:
    """A folder with `start` (a Hugging Face folder), prompts.jsonl, heldout.jsonl and the scorer `chance.py`."""

    folder: Path

    @cached_property
    def scores(self) -> np.ndarray:
        """[P, N]."""
        from transformers import AutoTokenizer

        score = _module(self.folder / "chance.py").score
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "start")
        texts = [tokenizer.decode(one, skip_special_tokens=True) for one in RESPONSES.said]
        told = [(text.strip(), bool(finished)) for text, finished in zip(texts, RESPONSES.finished, strict=True)]
        return np.array([[score(prompt, *one) for one in told] for prompt in PROMPTS])

    def table(self, folder: Path, *, temperature: float = 1.0) -> np.ndarray:
        """A policy's log-probabilities [P, C, V]: of an artifact or a Hugging Face folder, opened by transformers."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = np.zeros((len(PROMPTS), len(RESPONSES.contexts), len(WORDS)))
        for p, prompt in enumerate(PROMPTS):
            chat = [{"role": "user", "content": prompt}]
            before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for length in range(LONGEST):
                places = [c for c, one in enumerate(RESPONSES.contexts) if len(one) == length]
                ids = torch.tensor([[*before, *RESPONSES.contexts[c]] for c in places])
                with torch.no_grad():
                    logits = model(input_ids=ids).logits[:, -1].double()
                found[p, places] = (logits / temperature).log_softmax(-1).numpy()
        return found

    def start(self, *, temperature: float = 1.0) -> np.ndarray:
        return self.table(self.folder / "start", temperature=temperature)


def make_problem(folder: Path, *, seed: int = 0, copies: int = 128) -> Problem:
    """Write one. Each prompt comes `copies` times in prompts.jsonl, so that an iteration may have that many of each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(WORDS), max_position_embeddings=16, initializer_range=0.2, **special, **sizes
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "start")
    _tokenizer().save_pretrained(folder / "start")
    (folder / "chance.py").write_text(SCORER)
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(rows * copies))
    (folder / "heldout.jsonl").write_text("".join(rows))
    return Problem(folder)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation, the mean over prompts of half the sum of |difference|: [P, N], [P, N] probabilities."""
    assert np.allclose(one.sum(1), 1) and np.allclose(other.sum(1), 1)
    return float(np.abs(one - other).sum(1).mean() / 2)


def optimum(reference: np.ndarray, scores: np.ndarray, beta: float) -> np.ndarray:
    """What maximises E[score] - beta KL(policy || reference): reference exp(score / beta) / Z, [P, N].

    reference [P, C, V], scores [P, N].
    """
    logits = RESPONSES.logprobs(reference) + scores / beta
    likely = np.exp(logits - logits.max(1, keepdims=True))
    return likely / likely.sum(1, keepdims=True)


def published_grpo(reference: np.ndarray, scores: np.ndarray, beta: float) -> np.ndarray:
    """The policy that GRPO as published comes to with two samples a prompt: a table [P, C, V].

    Its loss is the mean over responses of the mean over their words of -A log p + beta k3, where k3 is
    reference / p - 1 - log(reference / p). On the policy's own samples the gradient is, with |y| for the length of y,

        E_y[ 1/|y| sum over its words v in contexts c of (A(y) - beta (1 - reference(v|c) / p(v|c))) grad log p(v|c) ].

    Let a and w be the means of A/|y| and of 1/|y| over the responses that say v in c. A policy that is free in every
    context has no gradient where a - beta w (1 - reference / p) is the same number z for every v, for then it is
    z times the gradient of sum_v p(v|c) = 1. So

        p(v|c) = beta w reference(v|c) / (z + beta w - a),   with the z that makes it sum to 1;

    a and w depend on p in turn, hence the iteration. It is no Gibbs distribution: the term pulls like KL(reference || p),
    which never lets a word go that the reference has. A(y) is exact: of two samples with scores d apart, the better one
    has (d/2) / (d / sqrt(2) + 1e-4), so a response's mean advantage is nearly its chance to win, less that to lose, over
    sqrt(2).
    """
    table = reference.copy()
    apart = scores[:, :, None] - scores[:, None, :]
    won = (apart / 2) / (np.abs(apart) / np.sqrt(2) + 1e-4)  # [P, N, N]
    share = RESPONSES.passed / RESPONSES.lengths[:, None, None]  # [N, C, V]
    for _ in range(2000):
        likely = np.exp(RESPONSES.logprobs(table))
        advantage = np.einsum("pnm,pm->pn", won, likely)
        said = np.einsum("pn,ncv->pcv", likely, RESPONSES.passed)
        w = np.einsum("pn,ncv->pcv", likely, share) / said
        a = np.einsum("pn,ncv->pcv", likely * advantage, share) / said
        low = (a - beta * w).max(-1, keepdims=True)
        high = a.max(-1, keepdims=True) + 0 * low  # there every p is the reference's or less
        for _ in range(60):
            z = (low + high) / 2
            total = (beta * w * np.exp(reference) / (z + beta * w - a)).sum(-1, keepdims=True)
            low, high = np.where(total > 1, z, low), np.where(total > 1, high, z)
        better = np.log(beta * w * np.exp(reference) / (high + beta * w - a))
        change = np.abs(better - table).max()
        table = (table + better) / 2
        if change < 1e-10:
            return table
    raise AssertionError(f"not solved: {change}")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
