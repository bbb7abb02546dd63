"""`rlhf ppo` as a user runs it: the numbers of a plain loop, what is logged and handed over, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers_plain_ppo import Plain, plain_run, plain_runs
from helpers_ppo import CASES, PPO, REWARD, WORDS, compare, iterations, made, make_folder, make_policy
from helpers_runs import Forks, files_below, metrics, relative_difference, series, states, weights, write_jsonl
from helpers_scoring import make_reward_model

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind

SHORT = [*PPO, "model.path=policy", "train.max_steps=1", "evaluation.every=0"]
SIMPLE = [*SHORT, WORDS, "advantage.estimator=reinforce", "evaluation.before=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("ppo"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Callable[[str], Plain]:
    return plain_runs(folder, CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_a_plain_loop(folder: Path, rlhf: Forks, plain: Callable[[str], Plain], case: str) -> None:
    """Three iterations, each sampled from what the one before came to."""
    run, expected = made(rlhf, folder, case, CASES[case]), plain(case)
    assert len(iterations(run)) == 3
    compare(run, expected)
    assert 0 < expected.cut_off < 3 * expected.config.rollout.episodes, "some responses end, and some do not"
    assert relative_difference(weights(run / "artifact"), weights(folder / "policy")) > 3e-3, "it has moved"


def test_what_the_cases_tell_apart(plain: Callable[[str], Plain]) -> None:
    """Or a rule that does nothing in them would not be missed."""
    gae = plain("gae")
    betas = [line["kl/beta"] for line in gae.lines]
    assert len(set(betas)) == 3 and betas[0] == 0.2
    assert any(line["rollout/score"] - line["rollout/score_final"] > 0.1 for line in gae.lines)
    average = {name: one.float() for name, one in gae.average.items()}
    assert relative_difference(average, {name: one.float() for name, one in gae.weights.items()}) > 1e-3
    assert max(line["policy/grad_norm"] for line in gae.lines) > gae.config.optim.max_grad_norm * 0.8
    assert ["rollout/baseline" in line for line in plain("reinforce").lines] == [False, True, True]
    skipped = plain("rloo_spread").skipped
    assert sum(skipped) > 0 and max(skipped) < 4
    assert plain("grpo").lines[0]["policy/kl"] > 0.1 and plain("grpo").lines[0]["rollout/kl"] > 0.1


def test_an_iteration_without_spread_learns_nothing(folder: Path, rlhf: Forks) -> None:
    """All scores are clipped to one number: there is no update, and the run goes on."""
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    write_jsonl(folder / "generous.jsonl", [row | {"bonus": 50} for row in prompts])
    run = made(rlhf, folder, "generous", CASES["rloo_spread"], "data.train=generous.jsonl", "train.max_steps=2")
    lines = [line for line in metrics(run) if "rollout/score" in line]
    assert [line["rollout/no_spread"] for line in lines] == [1.0, 1.0]
    assert not any(name.startswith("policy/") and name != "policy/lr" for line in lines for name in line)
    assert relative_difference(weights(run / "artifact"), weights(folder / "policy")) == 0


def test_what_is_logged(folder: Path, rlhf: Forks) -> None:
    run = made(rlhf, folder, "gae", CASES["gae"])
    lines = metrics(run)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    rollout = {
        "score",
        "score_std",
        "score_final",
        "score_words",
        "score_rm",
        "kl",
        "kl_k1",
        "kl_k2",
        "kl_k3",
        "entropy",
    }
    rollout |= {"length", "ended", "sampler_gap", "explained_variance", "score_length_correlation"}
    policy = {"loss", "ptx", "clip_fraction", "step_kl", "ratio_max", "grad_norm", "lr"}
    expected = {f"rollout/{name}" for name in rollout} | {f"policy/{name}" for name in policy}
    expected |= {"value/loss", "value/grad_norm", "kl/beta", "train/epoch", "step"}
    assert all(expected <= line.keys() for line in iterations(run))
    assert [line["step"] for line in iterations(run)] == [1, 2, 3]
    timings = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    phases = {f"time/{phase}_seconds" for phase in ("rollout", "score", "evaluate", "update", "iteration")}
    assert all(phases <= line.keys() for line in timings if "policy/loss" in line)
    held_out = [line for line in lines if "eval/score" in line]
    assert [line["step"] for line in held_out] == [0, 2, 3]
    # Before anything is learnt policy and reference are one, and draw the same.
    assert (held_out[0]["eval/kl"], held_out[0]["eval/win_rate"]) == (0.0, 0.5)
    assert held_out[-1]["eval/kl"] != 0.0
    assert all(
        line["eval/score"] == pytest.approx(line["eval/score_words"] + 0.5 * line["eval/score_rm"]) for line in held_out
    )
    shown = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(shown) == 3 * 2 and all(name in shown[0] for name in ("prompt", "response", "score", "reference"))


def test_what_is_handed_over(folder: Path, rlhf: Forks) -> None:
    """The averaged weights, which transformers opens without a complaint; and what they came from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = made(rlhf, folder, "gae", CASES["gae"])
    found = artifact.load(run / "artifact", kind=Kind.policy)
    assert (found.stage, found.step) == ("ppo", 3)
    assert {name: one.path for name, one in found.parents.items()} == {"model": "policy", "rewards.rm": "reward"}
    assert found.data["prompts"]["counts"]["rows"] == 24 and found.data["pretraining"]["counts"]["rows"] == 40
    assert found.metrics["eval/score"] == series(run, "eval/score")[-1]
    model, report = AutoModelForCausalLM.from_pretrained(run / "artifact", output_loading_info=True)
    assert (
        not any(report.values())
        and model.config.eos_token_id == AutoTokenizer.from_pretrained(run / "artifact").eos_token_id
    )
    reinforced = artifact.load(made(rlhf, folder, "grpo", CASES["grpo"]) / "artifact", kind=Kind.policy)
    assert {name: one.path for name, one in reinforced.parents.items()} == {"model": "policy", "reference": "other"}


def test_other_commands_take_it(folder: Path, rlhf: Forks) -> None:
    """The answers of `rlhf generate` to a prompt; `rlhf ppo` goes on from its own artifact."""
    run = made(rlhf, folder, "gae", CASES["gae"])
    short = ["sampling.max_new_tokens=6", "runtime.threads=1"]
    rlhf.run(
        folder, "generate", f"model.path={run}/artifact", "prompts.path=heldout.jsonl", "output=said.jsonl", *short
    )
    assert len((folder / "said.jsonl").read_text().splitlines()) == 8
    again = made(rlhf, folder, "again", [*SIMPLE, f"model.path={run}/artifact"])
    assert series(again, "rollout/kl")[0] == pytest.approx(0.0, abs=1e-6)
    said = artifact.load(again / "artifact", kind=Kind.policy).parents["model"].content_hash
    assert said == artifact.load(run / "artifact", kind=Kind.policy).content_hash


def test_prep_leaves_nothing_to_tokenise(rlhf: Forks, folder: Path, tmp_path: Path) -> None:
    for name in ("prompts.jsonl", "heldout.jsonl", "text.jsonl", "points.py"):
        shutil.copy(folder / name, tmp_path)
    for name in ("policy", "reward"):
        shutil.copytree(folder / name, tmp_path / name)
    job = rlhf.run(tmp_path, "prep", *CASES["gae"])
    cached = times(tmp_path / "runs/cache")
    assert sum(name.endswith(".arrow") for name in cached) == 3 and "Traceback" not in job.output
    rlhf.run(tmp_path, *CASES["gae"], "train.max_steps=1", "evaluation.before=false")
    assert times(tmp_path / "runs/cache") == cached


def times(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in files_below(folder)}


def test_what_is_done_for_memory_changes_nothing(folder: Path, rlhf: Forks) -> None:
    """Offloading between uses bit for bit; other rows, other batches of sampling and checkpointing up to rounding."""
    plain = made(rlhf, folder, "kept", [*SHORT, REWARD])
    less = ["reference.offload=true", "+rewards.rm.offload=true"]
    assert iterations(made(rlhf, folder, "offloaded", [*SHORT, REWARD, *less])) == iterations(plain)
    other = ["batch.row_length=60", "batch.micro_rows=3", "rollout.batch_tokens=90", "model.gradient_checkpointing=true",
             "+rewards.rm.batch_tokens=70"]  # fmt: skip
    (found,), (expected,) = (iterations(run) for run in (made(rlhf, folder, "packed", [*SHORT, REWARD, *other]), plain))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_adapters(folder: Path, rlhf: Forks) -> None:
    """The reference is the policy with its adapters off, for training and at evaluations; they are merged in the end."""
    lora = ["lora=default", "lora.rank=4", "optim.lr=3e-2", "train.max_steps=2", "evaluation.every=1"]
    run = made(rlhf, folder, "lora", [*SHORT, REWARD, *lora])
    kl, held_out = series(run, "rollout/kl"), series(run, "eval/kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and abs(kl[1]) > 1e-3
    assert held_out[0] == pytest.approx(0, abs=1e-6) and abs(held_out[-1]) > 1e-3
    handed, start = weights(run / "artifact"), weights(folder / "policy")
    changed = {name for name in start if not np.array_equal(handed[name], start[name])}
    assert changed == {name for name in start if name.endswith("_proj.weight")}
    apart = made(rlhf, folder, "lora_apart", [*SHORT, REWARD, *lora, "lora.merge=false"]) / "artifact"
    assert any(path.name.startswith("adapter_model") for path in apart.rglob("*"))


def test_a_reward_model_that_reads_other_tokens(folder: Path, rlhf: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses are rendered for it anew. As the start of a value model it will not do."""
    from transformers import AutoTokenizer

    foreign = make_reward_model(folder / "foreign", make_foreign(folder), seed=2)
    ours, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (folder / "policy", foreign))
    assert ours != theirs
    command = [*SHORT, "+rewards.rm.model.path=foreign", "+rewards.rm.normalised=false", "name=foreign"]
    job = rlhf.run(folder, *command, code=2)
    assert "value.init=reward_model: foreign has another tokenizer than the policy" in job.output
    assert "Traceback" not in job.output
    run = made(rlhf, folder, "foreign_policy", [*command[:-1], "value.init=policy"])
    monkeypatch.chdir(folder)
    plain = plain_run(folder, [*command[:-1], "value.init=policy"], iterations=1)
    assert series(run, "rollout/score_rm")[0] == pytest.approx(plain.lines[0]["rollout/score"], rel=1e-4)


def make_foreign(folder: Path) -> Path:
    """A model whose tokenizer has learnt other pieces."""
    import random

    from helpers_runs import sentence
    from transformers import AutoModelForCausalLM

    from rlhf_pipeline.config.schema import TokenizerConfig
    from rlhf_pipeline.data.tokenizer import train_tokenizer, with_template

    path = make_policy(folder / "foreign_base", seed=9)
    rng = random.Random(8)
    corpus = [f"User: {sentence(rng, 4, 9)}!" for _ in range(60)]
    tokenizer = with_template(
        train_tokenizer(corpus, vocab_size=330, context=256), TokenizerConfig(template="dialogue")
    )
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer))
    for name in ("bos", "eos", "pad"):
        setattr(model.config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    model.save_pretrained(path)

    tokenizer.save_pretrained(path)
    return path


# What ends a run


def refused(rlhf: Forks, folder: Path, name: str, command: list[str], *overrides: str) -> tuple[Path, str]:
    job = rlhf.run(folder, *command, f"name={name}", *overrides, code=2)
    assert "Traceback" not in job.output
    return folder / f"runs/{name}/ppo", job.output


def test_a_threshold_ends_a_run_with_its_state_saved(folder: Path, rlhf: Forks) -> None:
    """And the same command with another threshold goes on to the same end."""
    command = [*SIMPLE, "train.max_steps=3", "checkpoint.every=100"]
    run, said = refused(rlhf, folder, "ill", command, "health.max_ratio=1.01")
    assert "iteration 1: stopped, with the state saved" in said and "policy/ratio_max is " in said
    assert "more than health.max_ratio=1.01" in said and "optim.lr" in said
    assert states(run) == [1] and not (run / "artifact").exists()
    rlhf.run(folder, *command, "name=ill", "health.max_ratio=100")
    whole = made(rlhf, folder, "well", command)
    assert metrics(run) == metrics(whole)
    assert (run / "artifact/model.safetensors").read_bytes() == (whole / "artifact/model.safetensors").read_bytes()


SKEWED = """
import dataclasses

from rlhf_pipeline import rollout

drawn = rollout.completions


def skewed(*arguments, **named):
    for batch in drawn(*arguments, **named):
        yield [dataclasses.replace(one, logprobs=one.logprobs + 0.01) for one in batch]


rollout.completions = skewed


def words(episodes):
    return [float(len(one.response)) for one in episodes]
"""


def test_the_first_iteration_is_checked(folder: Path, rlhf: Forks) -> None:
    """A sampler that is not quite the policy; nothing is learnt, and nothing saved, of such a run."""
    (folder / "skewed.py").write_text(SKEWED)
    run, said = refused(rlhf, folder, "skewed", SIMPLE, "rewards.words.program=skewed:words")
    assert "iteration 1 cannot be trusted" in said
    assert "the sampler and the trainer give tokens other log-probabilities, 0.01 nats on average" in said
    assert states(run) == [] and not (run / "artifact").exists() and iterations(run) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.words.program=points:not_a_number"], "rewards.words: its score is nan for the prompt "),
        (["rewards.words.program=points:nothing"], "rewards.words: program=points:nothing: no such function in "),
        (["+rewards.rm.model.path=policy"], "rewards.rm: "),
        (["reference.path=foreign_words"], "reference.path=foreign_words: "),
        (["rollout.max_new_tokens=250"], "rollout.max_new_tokens=250: the longest prompt has "),
    ],
)
def test_mistakes(folder: Path, rlhf: Forks, overrides: list[str], message: str) -> None:
    if "reference.path=foreign_words" in overrides:
        make_foreign(folder).rename(folder / "foreign_words")
    run, said = refused(rlhf, folder, "mistake", SIMPLE, *overrides)
    assert message in said
    assert not (run / "artifact").exists()
    shutil.rmtree(run, ignore_errors=True)


def test_wandb_has_scores_kl_and_win_rates(folder: Path, rlhf: Forks) -> None:
    """Offline, as files on the disk."""
    made(rlhf, folder, "mirrored", [*SIMPLE, "evaluation.every=1", "tracking=offline"])
    (file,) = (folder / "runs/mirrored/ppo/wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in ("rollout/score", "rollout/kl", "policy/loss", "eval/win_rate", "eval/kl"):
        assert name.encode() in content, name
