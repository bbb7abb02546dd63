"""The faults: each a function that starts a command, hurts it, and says how it must have ended before it goes on.

All of them end in `Trial.again` or `Trial.compare`: the same command comes to the undisturbed run's end, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from helpers_runs import is_alive, states, wait_for

from faults.harness import AFTER_A_DEATH, KILLED, STOP, TERM, Fault, Hurt, Trial
from rlhf_pipeline.launch import PEER_DEATH_GRACE

# Seconds until all have ended after one has frozen: a collective's limit, once more for what DeepSpeed has begun
# meanwhile, the launcher's patience, and what a busy machine needs for all that.
FROZEN = 2 * 60.0 + PEER_DEATH_GRACE + 40.0
WAYS = ("cut short", "a bit changed", "removed")
LOST = 1  # the exit code of a process that has lost the others
USER = 2


# Killed


def kill(trial: Trial, rng: random.Random) -> None:
    """SIGKILL to every process at a random moment."""
    job = trial.start()
    trial.moment(job, rng)
    for pid in rng.sample(job.pids, len(job.pids)):
        _signal(pid, signal.SIGKILL)
    trial.end(job, KILLED, 0)
    trial.struck = 0 not in job.codes
    trial.again()


def kill_in_save(trial: Trial, rng: random.Random) -> None:
    """SIGKILL to the first process just before it changes a file of a state, of an artifact or of its output."""
    changes = trial.whole.changes
    saves = [i for i, change in enumerate(changes, 1) if re.search("state|artifact|responses|rewards|results", change)]
    number = rng.choice(saves)
    trial.told.append(f"change {number}: {changes[number - 1].partition('/runs/')[2]}")
    trial.end(trial.start(crash=number), KILLED, LOST)
    trial.again()


def kill_between_saves(trial: Trial, rng: random.Random) -> None:
    """SIGKILL to one rank while the ranks save: before its own part, or before it hears of the others'."""
    place = rng.choice(["rlhf_pipeline.resume:_write_slices", "rlhf_pipeline.resume:_gather"])
    calls = (trial.stage.steps + 1) // (1 if "ppo" in trial.stage.name else 2)
    _at(trial, rng.randrange(trial.ranks), place, rng.randint(1, calls), signal.SIGKILL)
    trial.again()


def kill_in_rollout(trial: Trial, rng: random.Random) -> None:
    """SIGKILL to one rank before it draws a batch of answers, or between two of them."""
    place = "rlhf_pipeline.rollout:completions" if trial.stage.steps else "rlhf_pipeline.generation.responses:append"
    _at(trial, rng.randrange(trial.ranks), place, rng.randint(1, 3), signal.SIGKILL)
    trial.again()


def term(trial: Trial, rng: random.Random) -> None:
    """SIGTERM to every process at a random moment, as the launcher passes it on."""
    job = trial.start()
    trial.moment(job, rng)
    for pid in job.pids:
        _signal(pid, signal.SIGTERM)
    trial.end(job, TERM, 0, *([LOST] if trial.ranks > 1 else []))
    trial.struck = any(job.codes)
    if "stopped with the state saved" in job.output and not states(trial.run):
        raise Hurt("it says that the state is saved, and there is none")
    trial.again()


def one_killed(trial: Trial, rng: random.Random) -> None:
    """SIGKILL to one rank of several at a random moment; the others end within a minute."""
    job = trial.start()
    trial.moment(job, rng)
    rank = rng.randrange(trial.ranks)
    _signal(job.pids[rank], signal.SIGKILL)
    since = time.monotonic()
    trial.end(job)
    took = time.monotonic() - since
    trial.struck = job.codes[rank] == KILLED
    trial.told.append(f"rank {rank}, the others after {took:.1f} s")
    if took > AFTER_A_DEATH and trial.struck:
        raise Hurt(f"the others ended {took:.0f} s after the death of rank {rank}")
    trial.again()


def one_frozen(trial: Trial, rng: random.Random) -> None:
    """SIGSTOP to one rank of several at a random moment; the others give up after a collective's time limit."""
    rank = rng.randrange(trial.ranks)
    if rng.random() < 0.25:  # before there are collectives
        trial.told.append("when it was about to join the others")
        told = [[rank, "at", "rlhf_pipeline.runtime:join_process_group:1", STOP]]
        job = trial.start(INJECT=json.dumps(told))
        wait_for(lambda: _is_stopped(job.pids[rank]), job, pause=0.02)
    else:
        job = trial.start()
        trial.moment(job, rng)
        _signal(job.pids[rank], STOP)
    since = time.monotonic()
    others = [pid for pid in job.pids if pid != job.pids[rank]]
    wait_for(lambda: not any(is_alive(pid) for pid in others), timeout=FROZEN, pause=0.2)
    took = time.monotonic() - since
    if [trial.bench.rlhf.poll(pid) for pid in others] == [0] * len(others):  # they were done
        trial.struck = False
        _signal(job.pids[rank], signal.SIGCONT)
    trial.end(job)
    trial.told.append(f"rank {rank}, the others after {took:.1f} s")
    trial.again()


# The disk


def full_disk(trial: Trial, rng: random.Random) -> None:
    """From a random change of its files on nothing more can be made."""
    number = rng.randint(1, len(trial.whole.changes))
    trial.told.append(f"change {number}: {trial.whole.changes[number - 1].partition('/runs/')[2]}")
    job = trial.start(full=number)
    trial.end(job, USER, 0)
    _explained(trial, job.output, "the disk is full", ended=job.codes[0] == 0)
    trial.again()


def small_disk(trial: Trial, rng: random.Random) -> None:
    """A file system of its own that is too small, and then larger."""
    disk = trial.folder / f"disk_{trial.name}"
    disk.mkdir()
    size = rng.randint(8, 1500)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=True)
    try:
        trial.overrides.append(f"runs={disk.name}")
        trial.told.append(f"{size} kB")
        job = trial.start()
        trial.end(job, USER, 0)
        _explained(trial, job.output, "the disk is full|No space left", ended=job.codes[0] == 0)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        trial.again()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()


def file_size(trial: Trial, rng: random.Random) -> None:
    """No file can grow beyond a random size."""
    limit = rng.randint(4_000, 300_000)
    trial.told.append(f"{limit} bytes")
    job = trial.start(INJECT=json.dumps([[rank, "file_size", limit] for rank in range(trial.ranks)]))
    trial.end(job, USER, 0)
    _explained(trial, job.output, "no file may become so large", ended=job.codes[0] == 0)
    trial.again()


# Damaged files


def damaged_state(trial: Trial, rng: random.Random) -> None:
    """A run is paused, and a file of its newest state is cut short, changed by a bit, or removed."""
    pause = rng.randint(1, trial.stage.steps - 1)
    trial.end(trial.start(f"train.stop_after={pause}"), 0)
    newest = trial.run / f"state/step_{states(trial.run)[-1]:08d}"
    trial.told.append(_damage(rng.choice(sorted(newest.iterdir())), rng))
    job = trial.again()
    if "damaged" not in job.output:
        raise Hurt(f"the damage was not noticed: {trial.told}\n{job.output}")


def damaged_artifact(trial: Trial, rng: random.Random) -> None:
    """A finished run's artifact is damaged; the same command makes it whole again."""
    trial.end(trial.start(), 0)
    files = [one for one in sorted((trial.run / "artifact").iterdir()) if one.name != "README.md"]
    trial.told.append(_damage(rng.choice(files), rng))
    trial.again()
    from rlhf_pipeline import artifact
    from rlhf_pipeline.artifact import Kind

    artifact.load(trial.run / "artifact", kind=tuple(Kind))


def damaged_parent(trial: Trial, rng: random.Random) -> None:
    """A file of the model that the command starts from is damaged: an error that names it; then it is put back."""
    parent = trial.folder / f"parent_{trial.name}"
    shutil.copytree(trial.folder / trial.stage.parent, parent)
    trial.overrides.append(f"model.path={parent.name}")
    try:
        file = rng.choice([one for one in sorted(parent.iterdir()) if one.name != "README.md"])
        # Without its manifest it is a Hugging Face folder like any other.
        hows = WAYS[:2] if file.name == "artifact.json" else WAYS
        trial.told.append(_damage(file, rng, hows))
        job = trial.start()
        trial.end(job, USER)
        if file.name not in job.output:
            raise Hurt(f"the error does not name {file.name}\n{job.output}")
        shutil.copy2(trial.folder / trial.stage.parent / file.name, file)
        trial.again()
    finally:
        shutil.rmtree(parent)


def removed_shard(trial: Trial, rng: random.Random) -> None:
    """One of the files that the weights of a plain Hugging Face folder are in is gone."""
    parent = trial.folder / f"parent_{trial.name}"
    shutil.copytree(trial.folder / "sharded", parent)
    trial.overrides.append(f"model.path={parent.name}")
    try:
        shard = rng.choice(sorted(parent.glob("*.safetensors")))
        kept = shard.read_bytes()
        trial.told.append(shard.name)
        shard.unlink()
        job = trial.start()
        trial.end(job, USER)
        if parent.name not in job.output:
            raise Hurt(f"the error does not name {parent.name}\n{job.output}")
        shard.write_bytes(kept)
        trial.again()
    finally:
        shutil.rmtree(parent)


def torn_output(trial: Trial, rng: random.Random) -> None:
    """Killed while it answers, and its last line is torn as by a power cut."""
    place = "rlhf_pipeline.generation.responses:append"
    _at(trial, 0, place, rng.randint(2, 3), signal.SIGKILL)
    for file in trial.run.glob("responses.partial-*.jsonl"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) - rng.randint(1, 60)])
    trial.again()


# Everything else


def clock(trial: Trial, rng: random.Random) -> None:
    """The clock jumps within the run, the run is killed, and every file seems older or newer than it is."""
    by = rng.choice([-1, 1]) * rng.uniform(3_600, 86_400 * 400)
    update, then = rng.randint(1, 2), rng.randint(3, trial.stage.steps)
    place = "rlhf_pipeline.ppo.updates:update" if "ppo" in trial.stage.name else "rlhf_pipeline.fit:update"
    trial.told.append(f"{by / 86_400:+.0f} days")
    told = [[rank, "clock", update, by] for rank in range(trial.ranks)]
    trial.end(trial.start(INJECT=json.dumps([*told, [0, "at", f"{place}:{then}", signal.SIGKILL]])), KILLED, LOST)
    for file in trial.run.rglob("*"):
        moved = max(0.0, time.time() + rng.choice([-by, by]))
        os.utime(file, (moved, moved))
    job = trial.start(INJECT=json.dumps([[rank, "clock", 1, -by] for rank in range(trial.ranks)]))
    trial.end(job, 0)
    trial.compare()


def no_wandb(trial: Trial, rng: random.Random) -> None:
    """wandb cannot be reached: a warning, and nothing else."""
    trial.overrides.append("tracking=wandb")
    address = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "4"}
    job = trial.start(**address, WANDB_SILENT="true")
    trial.end(job, 0)
    if "wandb (online) is off for this run" not in job.output:
        raise Hurt(f"nothing was said of wandb\n{job.output}")
    trial.compare()


def nan_loss(trial: Trial, rng: random.Random) -> None:
    """A loss that is not a number ends the run; the state before it is whole."""
    _nan(trial, rng, "loss")


def nan_gradient(trial: Trial, rng: random.Random) -> None:
    """The same of a gradient, on one rank."""
    _nan(trial, rng, "gradient")


def dead_server(trial: Trial, rng: random.Random) -> None:
    """The server that scores or judges dies in mid-run: an error that names it; then it is there again."""
    trial.fails_after = rng.randint(0, 9)
    job = trial.start()
    trial.end(job, USER)
    if trial.url not in job.output:
        raise Hurt(f"the error does not name {trial.url}\n{job.output}")
    trial.fails_after = None
    trial.again()


# Parts


def _signal(pid: int, number: int) -> None:
    if is_alive(pid):
        os.kill(pid, number)


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _at(trial: Trial, rank: int, place: str, call: int, number: int) -> None:
    trial.told.append(f"rank {rank}, {place.rpartition('.')[2]}, call {call}")
    job = trial.start(INJECT=json.dumps([[rank, "at", f"{place}:{call}", int(number)]]))
    took = trial.end(job, -int(number), LOST, 0)
    trial.struck = job.codes[rank] == -int(number)
    if took > AFTER_A_DEATH:
        raise Hurt(f"the others ended {took:.0f} s after the death of rank {rank}")


def _nan(trial: Trial, rng: random.Random, what: str) -> None:
    rank, update = rng.randrange(trial.ranks), rng.randint(1, trial.stage.steps)
    trial.told.append(f"update {update}")
    job = trial.start(INJECT=json.dumps([[rank, "nan", what, update]]))
    trial.end(job, USER)
    if "is not finite" not in job.output:
        raise Hurt(f"it does not say what is wrong\n{job.output}")
    trial.again()


def _explained(trial: Trial, output: str, words: str, *, ended: bool) -> None:
    trial.struck = not ended
    if not ended and not re.search(words, output):
        raise Hurt(f"it does not say what is wrong\n{output}")


def _damage(file: Path, rng: random.Random, hows: Sequence[str] = WAYS) -> str:
    """Hurt a file in one of three ways, as a new file: others may be linked to it. What was done."""
    content = bytearray(file.read_bytes())
    how = rng.choice(hows)
    file.unlink()
    if how == "cut short":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif how == "a bit changed":
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return f"{file.name} {how}"


FAULTS: dict[str, Fault] = {
    "kill -9": kill,
    "kill -9 in a save": kill_in_save,
    "kill -9 between ranks' saves": kill_between_saves,
    "kill -9 in a rollout": kill_in_rollout,
    "SIGTERM": term,
    "one rank killed": one_killed,
    "one rank frozen": one_frozen,
    "full disk": full_disk,
    "small file system": small_disk,
    "file size limit": file_size,
    "damaged state": damaged_state,
    "damaged artifact": damaged_artifact,
    "damaged parent": damaged_parent,
    "shard removed": removed_shard,
    "torn output": torn_output,
    "clock": clock,
    "no wandb": no_wandb,
    "NaN loss": nan_loss,
    "NaN gradient": nan_gradient,
    "dead server": dead_server,
}
