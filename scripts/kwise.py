"""The same rankings as whole prompts and as comparisons shuffled apart: which overfits? Prints a table in Markdown.

    python scripts/kwise.py [--seeds 3] [--epochs 1] [--runs runs/lab_kwise] [override ...]

Trains conf/experiment/lab_kwise_rm.yaml both ways with several seeds, from runs/demo/sft/artifact (make demo). Figures are
means over seeds, with the lowest and highest. Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

FORMS = {
    "whole": ["batch.examples=16"],
    "pairs": ["data.rankings=pairs", "batch.examples=256"],
}  # 16 comparisons a prompt
LAST = 0.2  # the share of the steps whose training loss is taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/lab_kwise"))
    given, overrides = parser.parse_known_args()

    rows = {}
    for form, own in FORMS.items():
        found = []
        for seed in range(given.seeds):
            folder = given.runs / f"{form}_{given.epochs}_epochs_{seed}"
            command = [sys.executable, "-m", "rlhf_pipeline", "rm", "experiment=lab_kwise_rm", *own, f"seed={seed}"]
            command += [f"run_dir={folder}", f"train.epochs={given.epochs}", "tracking.progress=false", *overrides]
            subprocess.run(command, check=True)
            found.append(figures(folder))
        rows[form] = found

    names = list(rows["whole"][0])
    print(f"\n| {given.epochs} epoch(s), {given.seeds} seeds | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for form, found in rows.items():
        print(f"| {form} | {' | '.join(shown([one[name] for one in found]) for name in names)} |")


def figures(folder: Path) -> dict[str, float]:
    """Of one run: the loss on what it trained on, and on held-out rankings at its best and at its end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line["train/loss"] for line in lines if "train/loss" in line]
    held_out = [line for line in lines if "eval/loss" in line]
    final = mean(trained[-max(1, round(LAST * len(trained))) :])
    return {
        "steps": len(trained),
        "training loss": final,
        "held-out loss": held_out[-1]["eval/loss"],
        "gap": held_out[-1]["eval/loss"] - final,
        "lowest held-out loss": min(line["eval/loss"] for line in held_out),
        "held-out accuracy": held_out[-1]["eval/accuracy"],
        "seconds of training": sum(line.get("time/step_seconds", 0.0) for line in lines),
    }


def shown(values: list[float]) -> str:
    middle, low, high = mean(values), min(values), max(values)
    if middle >= 10:
        return f"{middle:.0f}"
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
