"""PPO, RLOO and PPO-ptx on the lab, several seeds: gold score by criterion, KL, and what is left of the pretraining text.

    python scripts/lab_ppo.py [--seeds 3] [--variants lab_gold lab_rloo lab_ptx] [--jobs 1] [override ...]

Trains conf/experiment/<variant>_ppo.yaml from runs/demo/sft/artifact (make demo), then compares every policy with the
fine-tuned model by `rlhf evaluate` on 500 held-out prompts, and measures each one's loss on held-out documents by the
evaluation that `rlhf pretrain` makes before its first step. Prints tables in Markdown. Runs that are there already are
not made again. With `--jobs 2` two runs share the cores, one each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

SFT = Path("runs/demo/sft/artifact")
RLHF = [sys.executable, "-m", "rlhf_pipeline"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=["lab_gold", "lab_rloo", "lab_ptx"])
    parser.add_argument("--runs", type=Path, default=Path("runs/lab_ppo"))
    parser.add_argument("--jobs", type=int, default=1)
    given, overrides = parser.parse_known_args()
    own = ["runtime.threads=1"] if given.jobs > 1 else []
    policies = {f"{variant}_{seed}": (variant, seed) for variant in given.variants for seed in range(given.seeds)}

    def train(name: str) -> None:
        variant, seed = policies[name]
        command = [*RLHF, "ppo", f"experiment={variant}_ppo", f"seed={seed}", f"run_dir={given.runs / name}"]
        subprocess.run([*command, "tracking.progress=false", *own, *overrides], check=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(train, policies))

    artifacts = {"sft": SFT, **{name: given.runs / name / "artifact" for name in policies}}
    gold = gold_scores(artifacts, given.runs)
    text = {name: text_loss(path, given.runs / "text" / name) for name, path in artifacts.items()}
    print(tables(given.variants, given.seeds, gold, text, given.runs))


def gold_scores(artifacts: dict[str, Path], runs: Path) -> dict[str, Any]:
    """`rlhf evaluate kind=gold` of all policies beside each other."""
    systems = ",".join(f"{name}:{path}" for name, path in artifacts.items())
    folder = runs / "gold"
    if not (folder / "gold/results.json").is_file():
        command = [*RLHF, "evaluate", f"systems={{{systems}}}", f"run_dir={folder}", "samples=0"]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((folder / "gold/results.json").read_text())
    return found


def text_loss(artifact: Path, folder: Path) -> float:
    """Nats a token on the documents that `experiment=demo_pretrain` holds out."""
    if not (folder / "metrics.jsonl").is_file():
        command = [*RLHF, "pretrain", "experiment=demo_pretrain", "model=pretrained", f"model.path={artifact}"]
        command += [f"run_dir={folder}", "train.stop_after=1", "tracking.progress=false", "optim.lr=1e-12"]
        subprocess.run(command, check=True)
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return float(first["eval/loss"])


def tables(variants: list[str], seeds: int, gold: dict[str, Any], text: dict[str, float], runs: Path) -> str:
    """By seed, and by variant over seeds."""
    rows = ["| policy | gold | to sft, paired | KL | text, nats a token | minutes |", "|---|---|---|---|---|---|"]
    rows.append(f"| sft | {interval(gold['systems']['sft']['score'])} | | | {text['sft']:.3f} | |")
    for variant in variants:
        for seed in range(seeds):
            name = f"{variant}_{seed}"
            lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
            kl = [line["eval/kl"] for line in lines if "eval/kl" in line][-1]
            minutes = lines[-1]["time/elapsed"] / 60
            gap = interval(gold["differences"][f"{name} - sft"], sign=True)
            score = interval(gold["systems"][name]["score"])
            rows.append(f"| {name} | {score} | {gap} | {kl:.2f} | {text[name]:.3f} | {minutes:.1f} |")
    criteria = list(gold["systems"]["sft"]["by_criterion"])
    rows += ["", f"| by criterion, mean of seeds | {' | '.join(criteria)} |", f"|{'---|' * (len(criteria) + 1)}"]
    for variant, names in {"sft": ["sft"], **{v: [f"{v}_{s}" for s in range(seeds)] for v in variants}}.items():
        means = [mean(gold["systems"][name]["by_criterion"][one]["mean"] for name in names) for one in criteria]
        rows.append(f"| {variant} | {' | '.join(f'{value:.3f}' for value in means)} |")
    return "\n".join(rows)


def interval(found: dict[str, float], *, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{found['mean']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


if __name__ == "__main__":
    main()
