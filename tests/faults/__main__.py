"""`python -m faults --number 200 --seed 1`: the long plan, and its table as Markdown.

Exits with 1 when a trial did not survive, with what it said. The tests folder must be on the path (`make faults`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers_runs import forks

from faults.faults import FAULTS
from faults.harness import Bench, Result, tried
from faults.plan import APPLIES, plan


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--number", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=2, help="trials at once; a frozen rank is waited for a minute")
    options.add_argument("--stage")
    options.add_argument("--fault", choices=list(APPLIES))
    options.add_argument("--only", type=int, help="the trial of this number alone")
    given = options.parse_args()
    planned = plan(given.number, given.seed, stage=given.stage, fault=given.fault)
    planned = [one for one in planned if given.only in (None, one.number)]
    since = time.monotonic()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="faults_") as folder, ThreadPoolExecutor(given.jobs) as pool:
        bench = Bench.of(Path(folder) / "world", forks())
        waiting = [
            pool.submit(
                tried,
                bench,
                number=one.number,
                stage=one.stage,
                ranks=one.ranks,
                fault=one.fault,
                act=FAULTS[one.fault],
                seed=given.seed,
            )
            for one in planned
        ]
        for future in waiting:
            results.append(future.result())
            sys.stderr.write(line(results[-1]) + "\n")
            sys.stderr.flush()
    minutes = (time.monotonic() - since) / 60
    late = sum(not one.struck for one in results)
    lost = [one for one in results if one.trouble]
    sys.stdout.write(table(results))
    sys.stdout.write(
        f"\n{len(results)} faults with seed {given.seed} in {minutes:.0f} minutes, {len(results) - len(lost)} survived; "
        f"{late} came when the run was already through.\n"
    )
    return 1 if lost else 0


def line(result: Result) -> str:
    """One trial, for the log; with what its processes said where it did not survive."""
    what = f"{result.number:4d} {result.stage} x{result.ranks}, {result.fault}: "
    told = f" ({result.told})" if result.told else ""
    outcome = "FAILED" if result.trouble else "survived" if result.struck else "survived, came too late"
    return f"{what}{outcome} in {result.seconds:.1f} s{told}" + (f"\n{result.trouble}\n" if result.trouble else "")


def table(results: Sequence[Result]) -> str:
    """Stage x fault: survived of tried."""
    found: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for one in results:
        found[one.fault, one.stage.partition(",")[0]].append(not one.trouble)
    stages = list(dict.fromkeys(stage.partition(",")[0] for places in APPLIES.values() for stage in places))
    rows = [f"| fault | {' | '.join(stages)} | all |", "|---" * (len(stages) + 2) + "|"]
    for fault in APPLIES:
        cells = [found.get((fault, stage), []) for stage in stages]
        every = [one for cell in cells for one in cell]
        if every:
            rows.append(f"| {fault} | {' | '.join(map(_share, cells))} | {_share(every)} |")
    columns = [[one for (_, at), cell in found.items() if at == stage for one in cell] for stage in stages]
    total = [one for cell in found.values() for one in cell]
    rows.append(f"| **all** | {' | '.join(map(_share, columns))} | {_share(total)} |")
    return "\n".join(rows) + "\n"


def _share(survived: Sequence[bool]) -> str:
    return f"{sum(survived)}/{len(survived)}" if survived else ""


if __name__ == "__main__":
    sys.exit(main())
