"""PPO in plain torch over padded batches in fp64, by transformers' own models: what a run of `rlhf ppo` should come to.

Of the package it takes the config's figures, the sampler (whose draws are pinned by tests of their own) and the order of
the mixed-in text. Scores, KL, rewards, advantages, losses, Adam and the averages are written out here once more.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_rankings import plain_start
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_pipeline import config as configs
from rlhf_pipeline.config.schema import SamplingConfig
from rlhf_pipeline.data.order import mixed_in
from rlhf_pipeline.generation.decode import Question, completions

SHIFT, SCALE = 0.3, 2.0  # of the reward model's artifact


@dataclass
class Plain:
    """What a run came to. `lines` has an iteration's figures each."""

    config: Any
    policy: Any
    value: Any
    reference: Any
    average: dict[str, Tensor]
    beta: float
    baseline: float | None = None
    lines: list[dict[str, float]] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    cut_off: int = 0
    skipped: list[int] = field(default_factory=list)  # prompts of each iteration that were not trained on

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.policy.state_dict().items()}


@dataclass
class Padded:
    """Responses of an iteration, or texts: tokens [R, T] with what is before them, `own` where a token is learnt from."""

    tokens: Tensor
    own: Tensor  # bool [R, T]


def plain_runs(folder: Path, commands: Mapping[str, Sequence[str]]) -> Callable[[str], Plain]:
    """find(name): what three iterations of that command come to, computed once."""

    @functools.cache
    def find(name: str) -> Plain:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return plain_run(folder, commands[name], iterations=3)

    return find


def plain_run(folder: Path, command: Sequence[str], *, iterations: int) -> Plain:
    """The iterations that `rlhf <command>` in `folder` should make, on the CPU."""
    config = configs.load("ppo", list(command[1:]))
    tokenizer = AutoTokenizer.from_pretrained(folder / config.model.path)
    policy = AutoModelForCausalLM.from_pretrained(folder / config.model.path, dtype=torch.float64)
    reference = copy.deepcopy(policy)
    if config.reference.path:
        reference = AutoModelForCausalLM.from_pretrained(folder / config.reference.path, dtype=torch.float64)
    run = Plain(
        config, policy, _value(folder, config), reference.requires_grad_(False), dict(_copied(policy)), config.kl.beta
    )
    optimisers = {"policy": adam(policy, config.optim)}
    if run.value is not None:
        optimisers["value"] = adam(run.value, config.value.optim)
    prompts = rows_of(folder / config.data.train)
    for step in range(iterations):
        _iteration(run, optimisers, folder, tokenizer, prompts, step)
    return run


def _value(folder: Path, config: Any) -> Any:
    if config.advantage.estimator != "gae":
        return None
    if config.value.init == "policy":
        return plain_start(folder / config.model.path, config.seed).double()
    path = next(one.model.path for one in config.rewards.values() if one.model is not None)
    return AutoModelForSequenceClassification.from_pretrained(folder / path, dtype=torch.float64)


def adam(model: Any, optim: Any) -> Any:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps)


def _iteration(run: Plain, optimisers: Any, folder: Path, tokenizer: Any, prompts: list[Any], step: int) -> None:
    config = run.config
    samples, advantage, kl = config.rollout.samples, config.advantage, config.kl
    # 1 Roll out
    count = config.rollout.episodes // samples
    per_epoch = -(-len(prompts) // count)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([config.seed, 0, epoch]).permutation(len(prompts))
    rows = [prompts[i] for i in order[place * count : (place + 1) * count]]
    before = epoch * len(prompts) + place * count
    asked = [_prompt_tokens(tokenizer, row["prompt"]) for row in rows]
    drawn = _sampled(run, tokenizer, asked, before)
    padded = pad([prompt for prompt in asked for _ in range(samples)], [one.tokens.tolist() for one in drawn])
    ended = torch.tensor([one.finish == "stop" for one in drawn])
    run.cut_off += int((~ended).sum())
    said = [tokenizer.decode(one.text_tokens, skip_special_tokens=True).strip() for one in drawn]
    run.texts.append(said)

    # 2 Score
    total = torch.zeros(len(drawn), dtype=torch.float64)
    for one in config.rewards.values():
        total += one.weight * _scores(one, folder, [rows[i // samples] for i in range(len(drawn))], said, ended)

    # 3 Evaluate
    temperature = config.rollout.temperature
    with torch.no_grad():
        old, _ = logprobs(run.policy, padded, temperature)
        reference, _ = logprobs(run.reference, padded, temperature)
        values = None if run.value is None else state_values(run.value, padded)
    own = padded.own

    # 4 Shape
    scores = total if advantage.score_clip is None else total.clamp(-advantage.score_clip, advantage.score_clip)
    if advantage.missing_end == "subtract":
        scores = scores - advantage.missing_end_score * (~ended)
    elif advantage.missing_end == "substitute":
        scores = torch.where(ended, scores, advantage.missing_end_score)
    penalty = run.beta if kl.place == "reward" else 0.0
    advantages, returns = torch.zeros_like(old), torch.zeros_like(old)
    first_returns = []
    for row in range(len(own)):
        at = own[row].nonzero()[:, 0].tolist()
        rewards = [-penalty * float(old[row, t] - reference[row, t]) for t in at]
        rewards[-1] += float(scores[row])
        togo = [sum(advantage.gamma ** (j - i) * rewards[j] for j in range(i, len(at))) for i in range(len(at))]
        first_returns.append(togo[0])
        if values is not None:
            v = [float(values[row, t]) for t in at] + [0.0]
            deltas = [rewards[i] + advantage.gamma * v[i + 1] - v[i] for i in range(len(at))]
            decay = advantage.gamma * advantage.lam
            gae = [sum(decay ** (j - i) * deltas[j] for j in range(i, len(at))) for i in range(len(at))]
            advantages[row, at] = torch.tensor(gae, dtype=torch.float64)
            returns[row, at] = torch.tensor([a + b for a, b in zip(gae, v[:-1], strict=True)], dtype=torch.float64)
        elif advantage.estimator == "reinforce":
            advantages[row, at] = torch.tensor(togo, dtype=torch.float64)
        else:
            advantages[row, at] = sum(rewards)
    mean_return = float(np.mean(first_returns))
    if advantage.estimator == "reinforce":
        advantages[own] -= mean_return if run.baseline is None else run.baseline
    elif advantage.estimator in ("rloo", "grpo"):
        for prompt in range(len(rows)):
            group = range(prompt * samples, (prompt + 1) * samples)
            whole = [float(advantages[i][own[i]][0]) for i in group]
            for i, mine in zip(group, whole, strict=True):
                if advantage.estimator == "rloo":
                    now = mine - (sum(whole) - mine) / (samples - 1)
                else:
                    now = (mine - np.mean(whole)) / (np.std(whole, ddof=1) + 1e-4)
                advantages[i][own[i]] = now
    if advantage.whiten and advantage.estimator in ("gae", "reinforce"):
        every = advantages[own]
        advantages[own] = (every - every.mean()) / (every.var(correction=0) + 1e-8).sqrt()

    # 5 Update
    updates = []
    trained_on = before * samples * config.policy.epochs
    size = config.batch.examples // samples
    learnt = [p for p in range(len(rows)) if len(set(scores[p * samples : (p + 1) * samples].tolist())) > 1]
    learnt = learnt if advantage.skip_no_spread else list(range(len(rows)))
    run.skipped.append(len(rows) - len(learnt))
    for again in range(config.policy.epochs):
        shuffled = np.random.default_rng([config.seed, 2**32, step, again]).permutation(learnt)
        for part in np.array_split(shuffled, -(-len(learnt) // size)):
            taken = [p * samples + k for p in part for k in range(samples)]
            text = _text(config, folder, tokenizer, trained_on, len(taken))
            trained_on += len(taken)
            updates.append(_update(run, optimisers, padded, taken, old, reference, advantages, values, returns, text))
            for name, tensor in run.policy.named_parameters():
                run.average[name] = config.ema.decay * run.average[name] + (1 - config.ema.decay) * tensor.detach()

    divergence = torch.where(own, old - reference, 0.0).sum(1)
    line = {name: float(np.mean([one[name] for one in updates])) for name in updates[0]}
    line |= {
        "rollout/score": float(total.mean()),
        "rollout/score_std": float(total.std(correction=0)),
        "rollout/score_final": float(scores.mean()),
        "rollout/kl": float(divergence.mean()),
        "rollout/entropy": float(-old[own].mean()),
        "rollout/length": float(own.sum(1).double().mean()),
        "rollout/ended": float(ended.double().mean()),
        "kl/beta": run.beta,
    }
    if values is not None:
        spread = (returns - values)[own].var(correction=0) / returns[own].var(correction=0)
        line["rollout/explained_variance"] = float(1 - spread)
    if run.baseline is not None:
        line["rollout/baseline"] = run.baseline
    run.lines.append(line)
    if kl.controller == "adaptive":
        error = float(np.clip(float(divergence.mean()) / kl.target - 1, -0.2, 0.2))
        run.beta *= 1 + error * len(drawn) / kl.horizon
    if advantage.estimator == "reinforce":
        decay = advantage.baseline_decay
        run.baseline = mean_return if run.baseline is None else decay * run.baseline + (1 - decay) * mean_return


def _update(
    run: Plain,
    optimisers: Any,
    padded: Padded,
    taken: list[int],
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    returns: Tensor,
    text: Padded | None,
) -> dict[str, float]:
    config = run.config
    mine = Padded(padded.tokens[taken], padded.own[taken])
    new, entropy = logprobs(run.policy, mine, config.rollout.temperature)
    ratio = (new - old[taken]).exp()
    a, low, high = advantages[taken], 1 - config.policy.clip, 1 + config.policy.clip
    surrogate = -torch.minimum(ratio * a, ratio.clamp(low, high) * a)
    loss = _mean(surrogate, mine.own, config.policy.mean)
    found = {"policy/loss": float(loss.detach())}
    if config.kl.place == "loss":
        gap = reference[taken] - new
        found["policy/kl"] = float((term := _mean(gap.exp() - 1 - gap, mine.own, config.policy.mean)).detach())
        loss = loss + run.beta * term
    if config.policy.entropy:
        found["policy/entropy"] = float((term := _mean(entropy, mine.own, config.policy.mean)).detach())
        loss = loss - config.policy.entropy * term
    if text is not None:
        likelihood, _ = logprobs(run.policy, text, config.rollout.temperature)
        found["policy/ptx"] = float((term := _mean(-likelihood, text.own, config.ptx.mean)).detach())
        loss = loss + config.ptx.coefficient * term
    found["policy/grad_norm"] = _step(run.policy, optimisers["policy"], loss, config.optim.max_grad_norm)
    if values is not None:
        now, clip = state_values(run.value, mine), config.value.clip
        errors = (now - returns[taken]) ** 2
        if clip is not None:
            limited = torch.minimum(torch.maximum(now, values[taken] - clip), values[taken] + clip)
            errors = torch.maximum(errors, (limited - returns[taken]) ** 2)
        loss = 0.5 * errors[mine.own].mean()
        found["value/loss"] = float(loss.detach())
        found["value/grad_norm"] = _step(run.value, optimisers["value"], loss, config.value.optim.max_grad_norm)
    return found


def _step(model: Any, optimiser: Any, loss: Tensor, limit: float) -> float:
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    optimiser.step()
    optimiser.zero_grad()
    return norm


def _mean(numbers: Tensor, own: Tensor, over: str) -> Tensor:
    if over == "tokens":
        return numbers[own].mean()
    return torch.stack([row[here].mean() for row, here in zip(numbers, own, strict=True)]).mean()


def pad(before: Sequence[Sequence[int]], learnt: Sequence[Sequence[int]]) -> Padded:
    """On the right, with token 0, which nothing attends to."""
    width = max(len(a) + len(b) for a, b in zip(before, learnt, strict=True))
    tokens = torch.zeros(len(before), width, dtype=torch.int64)
    own = torch.zeros(len(before), width, dtype=torch.bool)
    for row, (a, b) in enumerate(zip(before, learnt, strict=True)):
        tokens[row, : len(a) + len(b)] = torch.tensor([*a, *b])
        own[row, len(a) : len(a) + len(b)] = True
    return Padded(tokens, own)


def logprobs(model: Any, padded: Padded, temperature: float) -> tuple[Tensor, Tensor]:
    """Of each token given those before, and the entropy of what it was drawn from, [R, T]; 0 at the first."""
    every = (model(input_ids=padded.tokens).logits[:, :-1] / temperature).log_softmax(-1)
    found = every.gather(-1, padded.tokens[:, 1:, None])[..., 0]
    entropy = -(every.exp() * every).sum(-1)
    first = found.new_zeros(len(found), 1)
    return torch.cat([first, found], 1), torch.cat([first, entropy], 1)


def state_values(model: Any, padded: Padded) -> Tensor:
    """What is expected before each token is drawn, [R, T]; 0 at the first."""
    found = model.score(model.model(input_ids=padded.tokens).last_hidden_state)[:, :-1, 0]
    return torch.cat([found.new_zeros(len(found), 1), found], 1)


def _sampled(run: Plain, tokenizer: Any, asked: list[list[int]], before: int) -> list[Any]:
    options, samples = run.config.rollout, run.config.rollout.samples
    questions = [
        Question(prompt=np.array(tokens, np.int32), id=before + i, samples=tuple(range(samples)))
        for i, tokens in enumerate(asked)
    ]
    plain = SamplingConfig(
        temperature=options.temperature, max_new_tokens=options.max_new_tokens, samples=samples, batch_tokens=10_000
    )
    end = tokenizer.eos_token_id
    model = copy.deepcopy(run.policy).float().eval()
    batches = completions(model, questions, plain, end_ids=[end], pad_id=end, seed=run.config.seed)
    found = {(one.id - before, one.sample): one for batch in batches for one in batch}
    return [found[i, k] for i in range(len(asked)) for k in range(samples)]


def _scores(one: Any, folder: Path, rows: list[dict[str, Any]], said: list[str], ended: Tensor) -> Tensor:
    if one.program is not None:
        from helpers_ppo import points

        return torch.tensor([points(text, row["bonus"]) for text, row in zip(said, rows, strict=True)])
    tokenizer = AutoTokenizer.from_pretrained(folder / one.model.path)
    model = AutoModelForSequenceClassification.from_pretrained(folder / one.model.path, dtype=torch.float64)
    found = []
    for text, row, whole in zip(said, rows, ended.tolist(), strict=True):
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
        ids = list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))
        end = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)
        ids = ids[: end + 1] if whole or not text else ids[:end]  # what was cut off has no end
        with torch.no_grad():
            found.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]))
    raw = torch.tensor(found, dtype=torch.float64)
    return (raw - SHIFT) / SCALE if one.normalised else raw


def _text(config: Any, folder: Path, tokenizer: Any, before: int, episodes: int) -> Padded | None:
    if not config.ptx.coefficient:
        return None
    every = rows_of(folder / config.ptx.train)
    rate = config.ptx.examples_per_episode
    chosen = mixed_in(before, before + episodes, ratio=rate / (1 + rate), size=len(every), seed=config.seed)
    ids = [[*tokenizer(every[i]["text"], add_special_tokens=False).input_ids, tokenizer.eos_token_id] for i in chosen]
    return pad([[tokenizer.bos_token_id] for _ in ids], ids) if ids else None


def _prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False))


def _copied(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, tensor.detach().clone()) for name, tensor in model.named_parameters()]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
