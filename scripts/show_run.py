"""Prints what runs came to: held-out loss before and after, and the last samples. `make demo` ends with it."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf_pipeline.tracking import read_metrics, read_samples


def main(folders: list[str]) -> None:
    console = Console()
    table = Table(title="held-out loss (nats per scored token)")
    for column in ("run", "steps", "before", "after", "tokens/s (median)"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for folder in map(Path, folders):
        lines = read_metrics(folder / "metrics.jsonl")
        losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
        speeds = sorted(line["time/tokens_per_second"] for line in lines if "time/tokens_per_second" in line)
        speed = f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-"
        table.add_row(str(folder), f"{lines[-1]['step']:,}", f"{losses[0]:.3f}", f"{losses[-1]:.3f}", speed)
    console.print(table)
    for folder in map(Path, folders):
        samples = read_samples(folder / "samples.jsonl")
        last = max((sample["step"] for sample in samples), default=0)
        console.print(f"\n[bold]{folder}[/bold], samples after step {last:,}")
        for sample in samples:
            if sample["step"] == last:
                console.print(
                    f"  [dim]{sample['prompt'].strip()}[/dim] -> {sample['response'].strip()}", highlight=False
                )


if __name__ == "__main__":
    main(sys.argv[1:])
