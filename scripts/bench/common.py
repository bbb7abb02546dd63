"""What the benchmarks beside TRL share. The two sides run in environments of their own and both import this file, so it
imports nothing but the standard library until it is asked to.

First what times a TRL trainer, then what builds the models and times one of our commands.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRL_PYTHON = ROOT / ".bench-venv" / "bin" / "python"
TRL_PPO_PYTHON = ROOT / ".bench-ppo-venv" / "bin" / "python"  # the last TRL that has PPO
SKIP = 3  # steps before the timing starts, on both sides
STEP_SECONDS = "time/step_seconds"  # as our trainers log it
VOCAB_SIZE = 8192

SHAPES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 688},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
}

KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""Makes glibc keep freed memory instead of handing it back to the kernel at every step."""


# A TRL trainer


def restart_keeping_memory() -> None:
    """glibc reads `KEEP_MEMORY` when a process starts, so start again, unless that has been done."""
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)


def seconds_since_process_start() -> float:
    """Seconds since the kernel started this process, to 10 ms; an `exec` does not set it back."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def peak_memory_gb() -> float:
    """Peak resident memory, 1e9 bytes. Not `ru_maxrss`: the process that started this one can leave its own there."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in status if line.startswith("VmHWM:"))


def cpu_seconds() -> dict[str, float]:
    """CPU seconds used so far by this process (`user`, `system`) and by the whole machine (`machine`)."""
    own = os.times()
    user, nice, system, _, _, irq, softirq, steal = (
        int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    machine = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return {"user": own.user, "system": own.system, "machine": machine}


def train_timed(
    trainer_class: Any,
    count: Callable[[dict[str, Any]], dict[str, int]],
    *,
    skip: int,
    max_seconds: float,
    **arguments: Any,
) -> list[dict[str, float]]:
    """Train until `max_seconds` are timed after the first `skip` steps.

    Returns running totals at the end of each optimiser step: of what `count` finds in a batch, which has `positions`
    and `tokens`, of the batches' losses and of time.
    """
    from transformers import TrainerCallback

    totals: dict[str, float] = {"loss": 0.0}
    records: list[dict[str, float]] = []

    class CountingTrainer(trainer_class):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # Counted where a batch is trained on, not in the collator: the loader is one batch ahead.
            for name, number in count(inputs).items():
                totals[name] = totals.get(name, 0) + number
            loss = super().training_step(model, inputs, *args, **kwargs)
            totals["loss"] += float(loss)
            return loss

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            records.append(
                {"time": time.perf_counter(), "start": seconds_since_process_start(), **totals, **cpu_seconds()}
            )
            timed = records[skip - 1 :]
            if len(timed) > 1 and timed[-1]["time"] - timed[0]["time"] >= max_seconds:
                control.should_training_stop = True

    CountingTrainer(callbacks=[Clock()], **arguments).train()
    return records


def measured(records: list[dict[str, float]], *, skip: int) -> dict[str, float]:
    """The figures of the steps after the first `skip`; `used` holds what they used of every total."""
    used = {name: records[-1][name] - records[skip - 1][name] for name in records[0]}
    seconds = used["time"]
    return {
        "tokens_per_second": used["tokens"] / seconds,
        "steps_timed": len(records) - skip,
        "seconds_timed": seconds,
        "cpu_seconds": used["user"] + used["system"],
        "padding_fraction": 1 - used["tokens"] / used["positions"],
        "system_cpu_fraction": used["system"] / (used["user"] + used["system"]),
        "other_cpus_busy": max(0.0, used["machine"] - used["user"] - used["system"]) / seconds,
        "peak_memory_gb": peak_memory_gb(),
        "first_step_seconds": records[0]["start"],
        "first_loss": records[0]["loss"],
        **{f"used_{name}": number for name, number in used.items()},
    }


def print_result(figures: dict[str, Any], output: Path | None = None) -> None:
    """One JSON object as the last line of output, with the versions of what ran."""
    names = ("trl", "transformers", "accelerate", "datasets", "torch")
    line = json.dumps(figures | {"versions": {name: version(name) for name in names}})
    if output is not None:
        output.write_text(line + "\n")
    sys.stdout.write(line + "\n")


# Our side, and what starts both


def install_trl(python: Path = TRL_PYTHON, requirements: str = "requirements.txt") -> None:
    """The benchmark's own environment, once."""
    if python.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pins = (HERE / requirements).read_text().split()
    subprocess.run([*pip, next(pin for pin in pins if pin.startswith("torch=="))], check=True)
    subprocess.run([*pip, "-r", HERE / requirements], check=True)


def parser_of(description: str | None, *, seconds: float, sizes: list[str], work: str) -> argparse.ArgumentParser:
    """The options that these benchmarks share, with the defaults of one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("RLHF_TEST_DATA")
    parser.add_argument("--data", type=Path, default=default, required=default is None, help="folder with the files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=seconds, help="timed, each run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=sizes, choices=list(SHAPES))
    parser.add_argument("--only", help="only runs with this in their name")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / work)
    return parser


def take_turns(
    contestants: dict[str, Callable[[], dict[str, float]]], *, rounds: int, work: Path, only: str | None = None
) -> dict[str, list[dict[str, float]]]:
    """The figures of every run with `only` in its name, round by round; shown and written as they come."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contestants if not only or only in name}
    for number in range(rounds):
        for name in results:
            figures = contestants[name]()
            results[name].append(figures)
            shown = ", ".join(f"{key} {value:,.2f}" for key, value in figures.items())
            print(f"round {number + 1}  {name}: {shown}", flush=True)
            (work / "results.json").write_text(json.dumps(results, indent=1))
    return results


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_tokenizer(documents: list[str]) -> Any:
    """A byte-level BPE of 8,192 tokens, with the dialogue template."""
    from rlhf_pipeline.config.schema import TokenizerConfig
    from rlhf_pipeline.data.tokenizer import train_tokenizer, with_template

    tokenizer = train_tokenizer(documents, vocab_size=VOCAB_SIZE, context=1024)
    return with_template(tokenizer, TokenizerConfig(template="dialogue"))


def llama(size: str, tokenizer: Any) -> Any:
    """The transformers config of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[size],
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def first_epoch(stage: str, overrides: list[str], work: Path) -> tuple[list[list[Any]], Any]:
    """The trees of our side's first epoch, batch by batch; and the order of all batches."""
    from rlhf_pipeline.config.compose import compose
    from rlhf_pipeline.data import stage as data_of

    config: Any = compose(stage, [f"runs={work}", *overrides])
    data = next(iter(data_of.data_sets(config, data_of.open_renderer(config))[0].values()))
    order = data_of.batch_order(config, data)
    return [[data[int(i)] for i in order.indices(step)] for step in range(len(order.starts[0]) - 1)], order


def run_trl(script: str, options: list[Any], python: Path = TRL_PYTHON) -> dict[str, Any]:
    """What a script prints as its last line, run in TRL's environment."""
    done = subprocess.run([python, HERE / script, *map(str, options)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """A run of ours: seconds to the end of the first step, the metrics of every step, and what was timed: from step
    `skip` on, or from the first where there are no more."""

    first_step_seconds: float
    lines: list[dict[str, float]]
    cpu_seconds: float  # used by the process since the first of the timed steps that was seen to end
    cpu_steps: int  # steps in that time
    wall_seconds: float  # that time, to 20 ms
    clock: str = STEP_SECONDS  # the metric that says how long a step took
    skip: int = SKIP

    @property
    def timed(self) -> list[dict[str, float]]:
        return self.lines[self.skip :] or self.lines

    @property
    def seconds(self) -> float:
        return sum(line[self.clock] for line in self.timed)

    @property
    def tokens(self) -> float:
        return sum(line["time/tokens_per_second"] * line["time/step_seconds"] for line in self.timed)


def run_ours(
    stage: str,
    overrides: list[str],
    work: Path,
    *,
    max_seconds: float | None = None,
    clock: str = STEP_SECONDS,
    skip: int = SKIP,
) -> Ours:
    """Run a stage to its end or, with `max_seconds`, until so much is timed after the first `skip` steps."""
    from rlhf_pipeline.tracking import read_metrics

    runs = work / "ours"
    subprocess.run(["rm", "-rf", runs], check=True)
    metrics, log = runs / "default" / stage / "metrics.jsonl", work / "ours.log"
    started = time.perf_counter()
    with log.open("w") as output:
        command = [sys.executable, "-m", "rlhf_pipeline", stage, f"runs={runs}", *overrides]
        process = subprocess.Popen(command, stderr=output)
    first_step, size = float("nan"), 0
    lines: list[dict[str, float]] = []
    used: list[tuple[int, float, float]] = []  # steps done from `skip` on, CPU seconds and time by then
    while process.poll() is None:
        time.sleep(0.02)
        before = len(lines)
        if metrics.exists() and metrics.stat().st_size != size:  # looked at only where there is something new
            size = metrics.stat().st_size
            lines = _steps(read_metrics(metrics), clock)
        if lines and not before:
            first_step = time.perf_counter() - started
        if len(lines) > max(before, skip - 1):
            used.append((len(lines), _cpu_seconds_of(process.pid), time.perf_counter()))
        if lines and max_seconds is not None and sum(line[clock] for line in lines[skip:]) >= max_seconds:
            process.send_signal(signal.SIGTERM)  # it saves its state and leaves
            break
    if process.wait() not in (0, *([] if max_seconds is None else [128 + signal.SIGTERM])):
        sys.exit(log.read_text())
    (first, before_cpu, begin), (last, after_cpu, end) = (used[0], used[-1]) if used else ((0, 0.0, 0.0),) * 2
    return Ours(
        first_step_seconds=first_step,
        lines=_steps(read_metrics(metrics), clock),
        cpu_seconds=after_cpu - before_cpu,
        cpu_steps=last - first,
        wall_seconds=end - begin,
        clock=clock,
        skip=skip,
    )


def _steps(lines: list[dict[str, float]], clock: str) -> list[dict[str, float]]:
    return [line for line in lines if clock in line]


def _cpu_seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """The processor, its cores and the system."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {platform.platform()}"
