"""Every direct objective on the lab, several seeds: gold score, win rate, KL, length, seconds. Prints Markdown.

    python scripts/lab_dpo.py [--seeds 3] [--runs runs/lab_dpo] [--jobs 1] [override ...]

Trains conf/experiment/lab_dpo.yaml (see there for the two commands that make its rankings) by each objective with

    rlhf dpo -m experiment=lab_dpo 'objective=glob(*)' seed=0,1,2

or rather one such sweep a seed, then compares all policies with the fine-tuned model by `rlhf evaluate` on 1,000 held-out
prompts, and draws answers to them anew for the KL. Memory is not shown: a sweep is one process, whose peak is that of all
its runs. Runs that are there already are not made again. With `--jobs 2`
two sweeps share the cores, one each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from omegaconf import OmegaConf

SFT = Path("runs/demo/sft/artifact")
RLHF = [sys.executable, "-m", "rlhf_pipeline"]
PROMPTS = 1000
SEQUENCE_FORM = "unlikelihood, sequence"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/lab_dpo"))
    parser.add_argument("--jobs", type=int, default=1)
    given, overrides = parser.parse_known_args()
    shared = ["runtime.threads=1"] if given.jobs > 1 else []

    def sweep(seed: int) -> None:
        command = [*RLHF, "dpo", "-m", "experiment=lab_dpo", f"seed={seed}", f"runs={given.runs / 'all'}"]
        command += [f"model.path={SFT}", "data.train=runs/lab/own_rankings.jsonl", "tracking.progress=false"]
        command += [*shared, *overrides]
        if not runs_of(given.runs, f"seed_{seed}"):
            subprocess.run([*command, f"name=seed_{seed}", "objective=glob(*)"], check=True)
        if not runs_of(given.runs, f"sequence_{seed}"):
            sequence = ["objective=unlikelihood", "objective.form=sequence"]
            subprocess.run([*command, f"name=sequence_{seed}", *sequence], check=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(sweep, range(given.seeds)))

    policies: dict[str, dict[int, Path]] = {}
    for seed in range(given.seeds):
        for objective, run in runs_of(given.runs, f"seed_{seed}").items():
            policies.setdefault(objective, {})[seed] = run
        policies.setdefault(SEQUENCE_FORM, {})[seed] = runs_of(given.runs, f"sequence_{seed}")["unlikelihood"]
    gold = gold_scores(policies, given.runs)
    print(table(policies, gold, given.runs))


def runs_of(runs: Path, name: str) -> dict[str, Path]:
    """The finished runs of a sweep by their objective."""
    found = {}
    for config in sorted((runs / "all" / name).glob("*/dpo/config.yaml")):
        if (config.parent / "artifact").exists():
            found[str(OmegaConf.load(config).objective.name)] = config.parent
    return found


def system_of(objective: str, seed: int) -> str:
    return f"{objective.replace(', ', '_')}_{seed}"


def gold_scores(policies: dict[str, dict[int, Path]], runs: Path) -> dict[str, Any]:
    """`rlhf evaluate kind=gold` of all policies beside each other."""
    systems = {"sft": SFT} | {
        system_of(name, seed): run / "artifact" for name, by_seed in policies.items() for seed, run in by_seed.items()
    }
    folder = runs / "gold"
    if not (folder / "gold/results.json").is_file():
        named = ",".join(f"{name}:{path}" for name, path in systems.items())
        command = [*RLHF, "evaluate", f"systems={{{named}}}", f"run_dir={folder}", "samples=0"]
        command += ["prompts.path=lab:heldout_prompts", f"prompts.lab.heldout_prompts={PROMPTS}"]
        subprocess.run([*command, "sampling.max_new_tokens=48"], check=True)
    found: dict[str, Any] = json.loads((folder / "gold/results.json").read_text())
    return found


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def divergences(policies: dict[str, dict[int, Path]]) -> dict[str, float]:
    """Mean of log pi - log pi_sft over answers that each policy draws to held-out prompts, by system: nats a response."""
    import torch

    from rlhf_pipeline.config.ppo import RolloutConfig
    from rlhf_pipeline.config.schema import LabConfig, PromptsConfig, ReadyModelConfig, TokenizerConfig
    from rlhf_pipeline.evaluation.implicit import log_probabilities
    from rlhf_pipeline.generation.load import open_renderer
    from rlhf_pipeline.generation.prompts import read_prompts
    from rlhf_pipeline.models.ready import open_policy
    from rlhf_pipeline.rollout import roll_out

    renderer = open_renderer(ReadyModelConfig(path=str(SFT)), TokenizerConfig())
    where = PromptsConfig(path="lab:heldout_prompts", lab=LabConfig(heldout_prompts=PROMPTS), cache_dir="runs/cache")
    asked = read_prompts(where, renderer, context=None).asked

    def opened(path: Path) -> Any:
        return open_policy(ReadyModelConfig(path=str(path)), renderer.tokenizer, torch.device("cpu"))

    reference, found = opened(SFT), {}
    for name, by_seed in policies.items():
        for seed, run in by_seed.items():
            policy = opened(run / "artifact")
            options = RolloutConfig(samples=1, max_new_tokens=48)
            trees = roll_out(policy.inner, asked, options, renderer=renderer, seed=0, first=0).trees
            ours, theirs = (
                np.concatenate(log_probabilities(model, trees, batch_tokens=8192)) for model in (policy, reference)
            )
            found[system_of(name, seed)] = float((ours - theirs).mean())
    return found


def table(policies: dict[str, dict[int, Path]], gold: dict[str, Any], runs: Path) -> str:
    """A line an objective: means over seeds, with the lowest and the highest."""
    kl = divergences(policies)
    scores = verdicts(runs / "gold/gold")
    rows = [
        "| objective | gold | to sft, paired: mean; seed 0 | win rate | KL | tokens | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| sft | {gold['systems']['sft']['score']['mean']:.3f} | | | | {tokens(runs, 'sft'):.1f} | |",
    ]
    for name, by_seed in sorted(policies.items()):
        names = [system_of(name, seed) for seed in by_seed]
        gaps = [gold["differences"][f"{one} - sft"] for one in names]
        first = gaps[0]
        cells = [
            spread([gold["systems"][one]["score"]["mean"] for one in names]),
            f"{mean(g['mean'] for g in gaps):+.3f}; {first['mean']:+.3f} [{first['low']:+.3f}, {first['high']:+.3f}]",
            spread([won(scores[one], scores["sft"]) for one in names]),
            spread([kl[one] for one in names], digits=2),
            f"{mean(tokens(runs, one) for one in names):.1f}",
            f"{median(seconds(run) for run in by_seed.values()):.0f}",
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def verdicts(folder: Path) -> dict[str, dict[int, float]]:
    """Scores by system and prompt."""
    found: dict[str, dict[int, float]] = {}
    for place, line in enumerate((folder / "verdicts.jsonl").read_text().splitlines()):
        for name, answer in json.loads(line)["answers"].items():
            found.setdefault(name, {})[place] = answer["score"]
    return found


def won(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Share of prompts with the better score, a tie half."""
    return mean(1.0 if ours[i] > theirs[i] else 0.5 * (ours[i] == theirs[i]) for i in theirs)


def tokens(runs: Path, system: str) -> float:
    return mean(row["response_tokens"] for row in answers(runs / "gold/answers" / system))


def seconds(run: Path) -> float:
    """Of all steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(sum(line.get("time/step_seconds", 0.0) for line in lines))


def spread(values: list[float], *, digits: int = 3) -> str:
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
