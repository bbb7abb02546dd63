"""`rlhf rm` as a user runs it: it learns, says what it learned, hands over what transformers opens, and goes on."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_rankings import (
    davidson,
    model_for,
    plain_objective,
    plain_rewards,
    plain_start,
    plain_tokens,
    ranks_of,
    small_tokenizer,
)
from helpers_runs import (
    RM_ON_FILES,
    SFT_ON_FILES,
    TINY_RUN,
    Forks,
    assert_same_end,
    copy_run,
    dialogues,
    files_below,
    logged_steps,
    metrics,
    rankings,
    series,
    states,
    wait_for,
    weights,
    write_jsonl,
)

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.ranking import Comparisons, RankingConfig, RankingLoss, Ties

BATCH, SEED, LAST = 8, 2, 15  # 15 steps in 3 epochs
RM = [
    *RM_ON_FILES,
    f"seed={SEED}",
    f"batch.examples={BATCH}",
    "batch.row_length=400",
    "train.epochs=3",
    "optim.lr=5e-3",
    "checkpoint.every=4",
    "checkpoint.keep=9",
    "normalise.train=demonstrations.jsonl",
    "evaluation.every=7",
]
TIES = ["objective.ties=model", "evaluation.before=false", "evaluation.every=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rankings of 2 to 9 answers with ties, one of them of ties alone."""
    folder = tmp_path_factory.mktemp("rm")
    rows = rankings(40)
    rows[3]["scores"] = [1.0] * len(rows[3]["scores"])
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "heldout.jsonl", rankings(12, seed=1))
    write_jsonl(folder / "demonstrations.jsonl", dialogues(20, seed=2, turns=1))
    return folder


def rows_of(folder: Path, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def made(rlhf: Forks, folder: Path, base: Path, name: str, *overrides: str) -> Path:
    run = folder / f"runs/{name}/rm"
    if not run.exists():
        rlhf.run(folder, *RM, f"model.path={base}", f"name={name}", *overrides)
    return run


@pytest.fixture(scope="module")
def trained(rlhf: Forks, folder: Path, base: Path) -> Path:
    return made(rlhf, folder, base, "trained")


@pytest.fixture(scope="module")
def with_ties(rlhf: Forks, folder: Path, base: Path) -> Path:
    return made(rlhf, folder, base, "with_ties", *TIES)


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "artifact/artifact.json").read_text())


# It learns


def test_it_learns_and_says_so(trained: Path) -> None:
    lines = metrics(trained)
    losses, right = series(trained, "train/loss"), series(trained, "train/accuracy")
    assert len(losses) == LAST
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5 and sum(right[-3:]) / 3 > 0.9
    assert all({"train/loss", "train/accuracy", "train/reward", "train/grad_norm", "train/lr"} < m.keys() for m in lines
               if "train/loss" in m)  # fmt: skip
    held_out = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in held_out] == [0, 7, 14, 15]
    assert held_out[-1]["eval/accuracy"] > max(0.85, held_out[0]["eval/accuracy"])
    assert held_out[-1]["eval/reward_chosen_mean"] > held_out[-1]["eval/reward_other_mean"]


def test_the_last_evaluation_lies_in_the_folder(trained: Path, folder: Path) -> None:
    found, last = json.loads((trained / "evaluation.json").read_text()), metrics(trained)[-1]
    scores = [row["scores"] for row in rows_of(folder, "heldout")]
    pairs = [(a, b) for one in scores for i, a in enumerate(one) for b in one[:i]]
    assert found["step"] == LAST and found["loss"] == last["eval/loss"]
    assert found["prompts"] == 12 and found["responses"] == sum(map(len, scores))
    assert found["pairs"] == sum(a != b for a, b in pairs) and found["tied_pairs"] == sum(a == b for a, b in pairs)
    assert found["accuracy"]["mean"] == last["eval/accuracy"] == manifest(trained)["metrics"]["eval/accuracy"]
    for picture in ("reliability.png", "rewards.png"):
        assert (trained / picture).read_bytes().startswith(b"\x89PNG") and (trained / picture).stat().st_size > 5000


OBJECTIVES: dict[str, RankingConfig] = {
    "{ties:model}": RankingConfig(ties=Ties.model),
    "{loss:plackett_luce}": RankingConfig(loss=RankingLoss.plackett_luce),
    "{margin:0.4}": RankingConfig(margin=0.4),
    "{label_smoothing:0.1}": RankingConfig(label_smoothing=0.1),
    "{soft_labels:0.35}": RankingConfig(soft_labels=0.35),
    "{centring:0.05}": RankingConfig(centring=0.05),
    "{divide_by:literal}": RankingConfig(divide_by=Comparisons.literal),
}


@pytest.fixture(scope="module")
def objectives(rlhf: Forks, folder: Path, base: Path) -> list[Path]:
    """A run of each, as a sweep in one process, and without demonstrations."""
    sweep = [f"objective={','.join(OBJECTIVES)}", "train.max_steps=3", "evaluation.before=false", "-m"]
    rlhf.run(folder, *RM, f"model.path={base}", "name=objectives", "normalise.train=null", *sweep)
    return [folder / f"runs/objectives/{job}/rm" for job in range(len(OBJECTIVES))]


def test_every_objective_begins_where_a_plain_computation_does(
    folder: Path, base: Path, trained: Path, objectives: list[Path]
) -> None:
    """Loss, accuracy and mean reward of the first batch, from rewards that transformers alone has computed."""
    import torch
    from transformers import AutoTokenizer

    rows = rows_of(folder)
    batch = [rows[i] for i in np.random.default_rng([SEED, 0, 0]).permutation(40)[:BATCH]]
    model, tokenizer = plain_start(base, SEED), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        rewards = [plain_rewards(model, plain_tokens(tokenizer, row)) for row in batch]
    ranks, scores = [ranks_of(row["scores"]) for row in batch], [row["scores"] for row in batch]
    log_tie = torch.tensor(davidson(rows))
    runs = [trained, *objectives]
    first = []
    for run, config in zip(runs, [RankingConfig(), *OBJECTIVES.values()], strict=True):
        expected = plain_objective(rewards, ranks, scores, config, log_tie if config.ties is Ties.model else None)
        centring = series(run, "train/centring")[0] * config.centring if config.centring else 0.0
        assert series(run, "train/loss")[0] + centring == pytest.approx(float(expected), rel=1e-5), config
        assert all(np.isfinite(series(run, "train/loss")))
        assert series(run, "train/reward")[0] == pytest.approx(float(torch.cat(rewards).mean()), abs=1e-5)
        first.append(series(run, "train/loss")[0])
    assert len({round(one, 4) for one in first}) == len(first) - 1, "centring alone leaves the ranking loss as it is"
    right = [
        np.mean([float(r[i] > r[j]) for i in range(len(k)) for j in range(len(k)) if k[i] < k[j]])
        for r, k in zip(rewards, ranks, strict=True)
        if len(set(k)) > 1
    ]
    assert series(trained, "train/accuracy")[0] == pytest.approx(np.mean(right), abs=1e-6)
    assert all(logged_steps(run) == 3 for run in runs[1:])


def test_held_out_loss_is_that_of_hard_labels(rlhf: Forks, folder: Path, base: Path, trained: Path) -> None:
    """Before the first step it is the same with soft labels as without; the loss that is trained differs."""
    run = made(rlhf, folder, base, "soft", "objective.soft_labels=0.35", "train.max_steps=1")
    assert series(run, "eval/loss")[0] == series(trained, "eval/loss")[0]
    assert abs(series(run, "train/loss")[0] - series(trained, "train/loss")[0]) > 1e-3


def test_pairs_shuffled_apart(rlhf: Forks, folder: Path, base: Path) -> None:
    """data.rankings=pairs: every comparison that somebody won is an example; what is held out stays whole."""
    less = ["data.rankings=pairs", "train.max_steps=2", "evaluation.before=false"]
    run = made(rlhf, folder, base, "pairs", *less)
    scores = [row["scores"] for row in rows_of(folder)]
    won = sum(a != b for one in scores for i, a in enumerate(one) for b in one[:i])
    counts = manifest(run)["data"]["rankings"]["counts"]
    assert counts["trees"] == won and counts["dropped_all_tied"] == sum(len(set(one)) == 1 for one in scores)
    assert json.loads((run / "evaluation.json").read_text())["prompts"] == 12


def test_how_likely_ties_are_is_learned_and_handed_over(with_ties: Path, trained: Path, folder: Path) -> None:
    start, found = davidson(rows_of(folder)), manifest(with_ties)["reward_log_tie"]
    assert 0.01 < abs(found - start) < LAST * 0.011, "Adam moves it by 0.01 a step at most"
    assert manifest(trained)["reward_log_tie"] is None
    assert series(with_ties, "train/loss")[-1] < series(with_ties, "train/loss")[0] - 0.3


def test_nothing_to_compare_in_a_batch(rlhf: Forks, folder: Path, base: Path) -> None:
    """Batches of one prompt, of which one ties throughout: a loss of 0 there, no NaN, and an end."""
    ordered = [row for row in rows_of(folder) if len(set(row["scores"])) > 1]
    rows = [ordered[0], rows_of(folder)[3], ordered[1]]
    write_jsonl(folder / "one_tied.jsonl", rows)
    small = ["data.train=one_tied.jsonl", "batch.examples=1", "train.epochs=1", "evaluation.before=false"]
    run = made(rlhf, folder, base, "one_tied", *small)
    losses, norms = series(run, "train/loss"), series(run, "train/grad_norm")
    order = np.random.default_rng([SEED, 0, 0]).permutation(3).tolist()
    assert losses[order.index(1)] == 0.0 == norms[order.index(1)]
    assert all(loss > 0 for i, loss in enumerate(losses) if i != order.index(1))
    assert np.isfinite(losses + norms).all()


# The artifact


def test_what_is_handed_over(trained: Path, base: Path) -> None:
    found = artifact.load(trained / "artifact", kind=Kind.reward_model)
    assert (found.stage, found.step) == ("rm", LAST)
    assert found.parents["model"].path == str(base)
    assert found.data["rankings"]["counts"]["rows"] == 40 and found.data["demonstrations"]["counts"]["rows"] == 20
    assert [path.name for path in sorted((trained / "artifacts").iterdir())] == ["epoch_1", "epoch_2", "epoch_3"]
    shifts = [json.loads((trained / f"artifacts/epoch_{n}/artifact.json").read_text()) for n in (1, 2, 3)]
    assert len({one["reward_shift"] for one in shifts}) == 3, "each by its own rewards"


def test_transformers_computes_the_rewards_and_their_zero(trained: Path, folder: Path) -> None:
    """On the demonstrations the handed-over rewards have mean 0 and spread 1; padded on either side they are the same.

    Absolute tolerance 1e-4 on rewards whose spread is 1.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder_of = trained / "artifact"
    model, report = AutoModelForSequenceClassification.from_pretrained(folder_of, output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder_of)
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id == 0
    chats = [row["messages"] for row in rows_of(folder, "demonstrations")]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    found = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        encoded = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            found.append(model.eval()(**encoded).logits[:, 0].double().numpy())
    said = manifest(trained)
    for raw in found:
        handed = (raw - said["reward_shift"]) / said["reward_scale"]
        assert handed.mean() == pytest.approx(0, abs=1e-4) and handed.std() == pytest.approx(1, abs=1e-4)
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert said["reward_scale"] > 0.05 and abs(said["reward_shift"]) > 0.01


def test_without_demonstrations_the_preferred_answers_are_the_zero(
    folder: Path, base: Path, objectives: list[Path]
) -> None:
    """The best answer to each prompt, the first of several."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = objectives[-1]
    model = AutoModelForSequenceClassification.from_pretrained(run / "artifact").eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(base), rows_of(folder)
    best = [plain_tokens(tokenizer, row)[int(np.argmax(row["scores"]))] for row in rows]
    with torch.no_grad():
        raw = plain_rewards(model, best).double().numpy()
    assert manifest(run)["reward_shift"] == pytest.approx(raw.mean(), abs=1e-5)
    assert manifest(run)["reward_scale"] == pytest.approx(raw.std(), abs=1e-5)


def test_it_goes_on_from_a_reward_model_with_its_head(rlhf: Forks, folder: Path, base: Path, trained: Path) -> None:
    """What it scores after loading is what was scored before saving, bit for bit."""
    run = made(rlhf, folder, trained / "artifact", "again", "train.max_steps=1")
    before, after = metrics(trained)[-1], metrics(run)[0]
    assert (before["step"], after["step"]) == (LAST, 0)
    assert {k: v for k, v in after.items() if k.startswith("eval/")} == {
        k: v for k, v in before.items() if k.startswith("eval/")
    }
    assert manifest(run)["parents"]["model"]["content_hash"] == manifest(trained)["content_hash"]


def test_one_token_for_everything(rlhf: Forks, folder: Path, tmp_path: Path) -> None:
    """As GPT-2 has it: end, start and padding are one token. A padding token is added, and a row of embeddings."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = small_tokenizer(["<|end|>"], **{f"{name}_token": "<|end|>" for name in ("eos", "bos", "unk", "pad")})
    start = model_for(tmp_path / "start", tokenizer, "gpt2")
    lengths = ["data.max_length=400", "data.max_prompt_length=150"]
    run = made(rlhf, folder, start, "one_token", *lengths, "train.max_steps=2", "evaluation.before=false")
    found, said = AutoTokenizer.from_pretrained(run / "artifact"), manifest(run)
    assert found.pad_token == "<|pad|>" and found.pad_token_id == said["special_ids"]["pad"] == len(tokenizer)
    model, report = AutoModelForSequenceClassification.from_pretrained(run / "artifact", output_loading_info=True)
    assert not any(report.values())
    assert model.config.pad_token_id == len(tokenizer) and model.config.vocab_size == said["vocab_size"] == len(found)
    rows = rows_of(folder, "demonstrations")
    texts = [found.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    encoded = found(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        raw = model.eval()(**encoded).logits[:, 0].double().numpy()
    assert said["reward_shift"] == pytest.approx(raw.mean(), abs=1e-4)
    assert said["reward_scale"] == pytest.approx(raw.std(), abs=1e-4)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sft", "model.path=ARTIFACT"], "is a reward_model (made by rlhf rm), and a policy is needed here"),
        (
            ["sft", "model.path=plain"],
            "plain: is a classifier (a reward model is one); a causal language model is needed",
        ),
        (["rm", "data.train=tied.jsonl", "objective.ties=model", "model.path=BASE"], "all answers to every prompt tie"),
        (["rm", "data.train=ranked.jsonl", "objective.soft_labels=1", "model.path=BASE"], "have a score, so there is"),
    ],
)
def test_mistakes(rlhf: Forks, folder: Path, base: Path, trained: Path, command: list[str], message: str) -> None:
    from transformers import AutoModelForSequenceClassification

    if "model.path=plain" in command:
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder / "plain")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(base / file, folder / "plain")
    write_jsonl(folder / "tied.jsonl", [{**row, "scores": [1, 1]} for row in rankings(6, most=2)])
    ranked = [{"prompt": row["prompt"], "responses": row["responses"], "ranks": [0, 1]} for row in rankings(6, most=2)]
    write_jsonl(folder / "ranked.jsonl", ranked)
    write_jsonl(folder / "chats.jsonl", dialogues(6))
    stage, *rest = command
    line = RM if stage == "rm" else [*SFT_ON_FILES, *TINY_RUN, "data.train=chats.jsonl", "data.heldout=chats.jsonl"]
    rest = [one.replace("ARTIFACT", str(trained / "artifact")).replace("BASE", str(base)) for one in rest]
    job = rlhf.run(folder, *line, *rest, "batch.examples=2", "name=mistake", code=2)
    assert message in job.output and "Traceback" not in job.output
    shutil.rmtree(folder / "runs/mistake", ignore_errors=True)


# Stopped and started again


def test_kill_9_is_not_seen_in_the_end(rlhf: Forks, folder: Path, base: Path, trained: Path) -> None:
    run, after = folder / "runs/killed/rm", random.SystemRandom().randint(1, LAST - 3)
    command = [*RM, f"model.path={base}", "name=killed"]
    for _ in range(10):  # on a busy machine it may be done before we look
        shutil.rmtree(run, ignore_errors=True)
        job = rlhf.start(folder, *command)
        wait_for(lambda: logged_steps(run) >= after, job)
        job.signal(signal.SIGKILL)
        if job.wait(-signal.SIGKILL, 0).codes != [0]:
            break
    print(f"killed after step {logged_steps(run)}, states {states(run)}")
    rlhf.run(folder, *command)
    assert_same_end(run, trained)


def test_a_pause_is_not_seen_in_the_end_where_ties_are_modelled(
    rlhf: Forks, folder: Path, base: Path, with_ties: Path
) -> None:
    run = copy_run(with_ties, folder / "runs/paused/rm")
    for name in ("artifact", "artifacts/epoch_2", "artifacts/epoch_3", "state/step_00000015", "state/step_00000012"):
        shutil.rmtree(run / name)
    assert states(run) == [4, 8]
    job = rlhf.run(folder, *RM, f"model.path={base}", "name=paused", *TIES)
    assert "resumed after step 8" in job.output
    assert_same_end(run, with_ties)
    assert manifest(run)["reward_log_tie"] == manifest(with_ties)["reward_log_tie"]
    assert manifest(run)["reward_shift"] == manifest(with_ties)["reward_shift"]


def test_a_state_holds_the_tie_strength(with_ties: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(with_ties / f"state/step_{LAST:08d}/rank_00000.safetensors")
    names = {name.split("|")[1] for name in saved}  # <engine>|<name>|<start>|<what>
    assert "tie.moved" in names and "scorer.inner.score.weight" in names
    assert {f"scorer.inner.{name}" for name in weights(with_ties / "artifact")} | {"tie.moved"} == names
    assert "tie.moved" not in {name.rpartition(".inner.")[2] for name in weights(with_ties / "artifact")}


def test_other_objectives_are_another_run(rlhf: Forks, folder: Path, base: Path, with_ties: Path) -> None:
    before = {name: (with_ties / name).read_bytes() for name in files_below(with_ties)}
    job = rlhf.run(folder, *RM, f"model.path={base}", "name=with_ties", *TIES, "objective.margin=0.1", code=2)
    assert "objective.margin: was 0.0, is now 0.1" in job.output and "Traceback" not in job.output
    assert {name: (with_ties / name).read_bytes() for name in files_below(with_ties)} == before
