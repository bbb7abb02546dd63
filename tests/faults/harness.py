"""Runs a command, hurts it, runs it again, and compares its end with that of an undisturbed run.

Commands run in forks of a warm server (helpers_runs.Forks), a process a rank, watched by the launcher's own `watch`.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers_runs import Forks, Job, files_below, is_alive

from faults.serving import answer
from faults.stages import Stage, make_world, stages
from rlhf_pipeline import artifact, launch
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.errors import UserError

ONE_RANK = 120.0  # seconds until a command of one process counts as hanging
SEVERAL = 240.0  # of several: a collective's 60 and as much again, the launcher's 20, and a busy machine
AFTER_A_DEATH = 60.0  # seconds in which the launcher has ended the others
KILLED, TERM, STOP = -int(signal.SIGKILL), 128 + int(signal.SIGTERM), int(signal.SIGSTOP)
UNCLEAR = ("Traceback", "went wrong that should not have", "terminate called", "Fatal Python error")


class Hurt(AssertionError):
    """A fault that a command did not survive."""


@dataclass(kw_only=True)
class Undisturbed:
    """What a run comes to that nobody hurts."""

    run: Path
    seconds: float  # of the first rank's processor
    changes: list[str]  # of its files by the first rank, in order


@dataclass(kw_only=True)
class Bench:
    """What all trials share: the world, the fork server, the undisturbed runs, a server that scores and judges."""

    world: Path
    rlhf: Forks
    known: dict[tuple[str, int], Undisturbed] = field(default_factory=dict)
    making: threading.Lock = field(default_factory=threading.Lock)
    serving: threading.Lock = field(default_factory=threading.Lock)
    port: int = field(default_factory=launch.free_port)  # of the server; its address is part of a run's identity

    @classmethod
    def of(cls, folder: Path, rlhf: Forks) -> Bench:
        return cls(world=make_world(folder), rlhf=rlhf)

    def undisturbed(self, stage: Stage, ranks: int) -> Undisturbed:
        with self.making:
            if (stage.name, ranks) not in self.known:
                trial = Trial(
                    bench=self, stage=stage, ranks=ranks, name=f"whole_{ranks}_{stage.folder}_{len(self.known)}"
                )
                with trial.served():
                    job = trial.start(crash=0)
                    seconds = _watched(job.pids[0])
                    trial.end(job, 0)
                self.known[stage.name, ranks] = Undisturbed(
                    run=trial.run,
                    seconds=seconds,
                    changes=re.findall(r"^change \d+: (.*)$", job.output, re.MULTILINE),
                )
        return self.known[stage.name, ranks]


def _processor_seconds(pid: int) -> float:
    """What a process has used, 0 where it is gone."""
    try:
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def _watched(pid: int) -> float:
    """The processor time of a process by its end."""
    seconds = 0.0
    while is_alive(pid):
        seconds = max(seconds, _processor_seconds(pid))
        time.sleep(0.01)
    return seconds


class _Forked:
    """A rank as the launcher's `watch` takes it."""

    def __init__(self, rlhf: Forks, pid: int) -> None:
        self.rlhf, self.pid = rlhf, pid
        self.ended_at: float | None = None

    def poll(self) -> int | None:
        code = self.rlhf.poll(self.pid)
        if code is not None and self.ended_at is None:
            self.ended_at = time.monotonic()
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass(kw_only=True)
class Trial:
    """One run that is hurt."""

    bench: Bench
    stage: Stage
    ranks: int
    name: str
    overrides: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    url: str = ""
    fails_after: int | None = None  # answers of the server until it dies
    struck: bool = True  # whether the fault came before the run's end
    told: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.bench.world

    @property
    def run(self) -> Path:
        root = next((one.partition("=")[2] for one in self.overrides if one.startswith("runs=")), "runs")
        return self.folder / root / self.name / self.stage.folder

    @property
    def whole(self) -> Undisturbed:
        return self.bench.undisturbed(self.stage, self.ranks)

    def command(self) -> list[str]:
        parent = [f"model.path={self.stage.parent}"] if self.stage.parent else []
        asked = [f"{self.stage.server}={self.url}"] if self.stage.server else []
        if self.stage.folder == "evaluate":  # or it would have answers of another trial's
            asked.append(f"judge.chat.cache_dir=runs/{self.name}/judge")
        mine = {one.partition("=")[0] for one in self.overrides}
        return [*self.stage.command, *(one for one in parent if one.partition("=")[0] not in mine), *asked,
                f"name={self.name}", *self.overrides]  # fmt: skip

    def start(self, *more: str, **options: Any) -> Job:
        job = self.bench.rlhf.start(self.folder, *self.command(), *more, ranks=self.ranks, **options)
        self.jobs.append(job)
        return job

    def end(self, job: Job, *expected: int) -> float:
        """Wait for the job as the launcher does, for every rank to have ended. Seconds from the first end to the last.

        Raises:
            Hurt: when it hangs, or ends with a code that is none of `expected` (any, where none is given) or of that kind.
        """
        ranks = [_Forked(self.bench.rlhf, pid) for pid in job.pids]
        limit = ONE_RANK if self.ranks == 1 else SEVERAL
        hung: list[str] = []

        def give_up() -> None:
            hung.append(f"still at work after {limit:.0f} s")
            for rank in ranks:
                rank.kill()

        timer = threading.Timer(limit, give_up)
        timer.start()
        try:
            code = launch.watch(ranks)
        finally:
            timer.cancel()
        job.codes = [rank.poll() or 0 for rank in ranks]
        if hung:
            raise Hurt(f"{hung[0]}\n{job.output}")
        unclear = [words for words in UNCLEAR if words in job.output]
        if unclear:
            raise Hurt(f"it says: {unclear}\n{job.output}")
        if expected and code not in (128 - one if one < 0 else one for one in expected):
            raise Hurt(f"exit code {code} (ranks {job.codes}), expected {expected}\n{job.output}")
        ends = [rank.ended_at or 0.0 for rank in ranks]
        return max(ends) - min(ends)

    def moment(self, job: Job, rng: random.Random) -> None:
        """Wait for a random moment of the run: by its processor time, for the machine may be busy."""
        pid, until = job.pids[0], rng.uniform(0.02, 0.75) * self.whole.seconds
        while is_alive(pid) and _processor_seconds(pid) < until:
            time.sleep(0.005)

    @contextmanager
    def served(self) -> Iterator[None]:
        """The server that the stage asks, if it asks one; it dies after `fails_after` answers."""
        if not self.stage.server:
            yield
            return
        answers = [0]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                answers[0] += 1
                if self.fails_after is not None and answers[0] > self.fails_after:
                    handler.close_connection = True
                    handler.connection.close()  # as one that was killed
                    return
                content = answer(body)
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(self, *arguments: Any) -> None: ...

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *arguments: Any) -> None: ...

        with self.bench.serving:
            server = Quiet(("127.0.0.1", self.bench.port), Handler)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            try:
                yield
            finally:
                server.shutdown()
                server.server_close()

    # What must hold

    def check_artifacts(self) -> None:
        """Every artifact that can be loaded is one that the undisturbed run wrote, to the bit."""
        for folder in [self.run / "artifact", *sorted((self.run / "artifacts").glob("*"))]:
            if not folder.is_dir():
                continue
            try:
                artifact.load(folder, kind=tuple(Kind))
            except UserError:
                continue
            # Complete, but not yet of its own name: killed in between.
            place = folder.with_name(folder.name.removesuffix(".partial").removesuffix(".old"))
            name = place.relative_to(self.run) / "model.safetensors"
            expected = self.whole.run / name
            if not expected.exists() or (folder / name.name).read_bytes() != expected.read_bytes():
                raise Hurt(f"{folder} can be loaded, and is not what the undisturbed run wrote")

    def again(self) -> Job:
        """The same command once more, to its end, which must be that of the undisturbed run."""
        self.check_artifacts()
        job = self.start()
        self.end(job, 0)
        self.compare()
        return job

    def compare(self) -> None:
        self.check_artifacts()
        try:
            self.stage.same_end(self.run, self.whole.run)
        except AssertionError as error:
            raise Hurt(f"another end than the undisturbed run's: {str(error)[:500]}") from error
        left = [name for name in files_below(self.run) if name.endswith((".partial", ".tmp")) or ".partial/" in name]
        if left:
            raise Hurt(f"left behind: {left[:5]}")

    def clean(self) -> None:
        for job in self.jobs:
            for pid in job.pids:
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.run.parent, ignore_errors=True)


Fault = Callable[[Trial, random.Random], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    stage: str
    ranks: int
    fault: str
    number: int
    seed: int
    seconds: float
    struck: bool
    told: str
    trouble: str  # empty where it survived


def tried(bench: Bench, *, number: int, stage: str, ranks: int, fault: str, act: Fault, seed: int) -> Result:
    """One trial from its start to its end; whatever goes wrong is in the result."""
    trial = Trial(bench=bench, stage=stages()[stage], ranks=ranks, name=f"trial_{number:04d}")
    rng = random.Random(f"{seed} {number} {stage} {ranks} {fault}")
    trouble, since = "", time.monotonic()
    try:
        _ = trial.whole
        with trial.served():
            act(trial, rng)
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}" if not isinstance(error, Hurt) else str(error)
    finally:
        outputs = "\n---\n".join(job.output for job in trial.jobs) if trouble else ""
        if not trouble:
            trial.clean()
    return Result(
        stage=stage,
        ranks=ranks,
        fault=fault,
        number=number,
        seed=seed,
        seconds=time.monotonic() - since,
        struck=trial.struck,
        told="; ".join(trial.told),
        trouble=trouble + (f"\n{outputs}" if outputs else ""),
    )
