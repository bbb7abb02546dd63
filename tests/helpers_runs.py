"""Runs the product for the integration tests: in a fresh interpreter, or in forks of one that has imported everything.

Most of a short run's time goes into importing torch, transformers and DeepSpeed. `Forks` starts one Python process that
imports them and then forks a child for each command; the child calls the same command line as the `rlhf` program does,
with arguments, environment, folder and session of its own, and can be killed like any other process. What depends on a
fresh interpreter or on the launcher uses `program` and `launched`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rlhf_pipeline

REPOSITORY = Path(rlhf_pipeline.__file__).parents[1]
SERVER = Path(__file__).with_name("helpers_fork_server.py")
TIMEOUT = 300.0  # seconds for a run that takes two: the machine may be busy
ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
}
NO_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# A model of 28,000 parameters; seconds a run.
TINY_SHAPE = [
    "model.shape.architecture=llama",
    "model.shape.hidden=32",
    "model.shape.layers=2",
    "model.shape.heads=2",
    "model.shape.kv_heads=1",
    "model.shape.intermediate=48",
    "model.shape.vocab_size=400",
    "model.shape.context=256",
    "model.shape.init_std=0.1",
]
TINY_RUN = [
    "runtime.threads=1",
    "tracking.progress=false",
    "evaluation.samples=2",
    "evaluation.sample_tokens=6",
]
SFT_ON_FILES = [
    "sft",
    "data.train=train.jsonl",
    "data.heldout=heldout.jsonl",
    "data.max_length=160",
    "data.max_prompt_length=100",
]
RM_ON_FILES = ["rm", *SFT_ON_FILES[1:], *TINY_RUN, "evaluation.samples=0"]
DPO_ON_FILES = ["dpo", *RM_ON_FILES[1:], "sampled.prompts=0"]
WORDS = [
    *("the", "a", "red", "blue", "old", "cat", "dog", "man", "sits", "runs", "reads", "on", "under", "by", "mat"),
    *("tree", "house", "book", "and", "then", "today", "slowly"),
]


@dataclass(kw_only=True)
class Job:
    """A command at work: one process, or one a rank."""

    pids: list[int]
    wait_codes: Callable[[float], list[int]]
    logs: list[Path]
    codes: list[int] = field(default_factory=list)

    @property
    def output(self) -> str:
        """What the processes wrote to stdout and stderr."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def signal(self, number: int, rank: int | None = None) -> None:
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, number)

    def wait(self, *expected: int, timeout: float = TIMEOUT) -> Job:
        """Wait for every process to end; each must end with one of `expected` (0). Negative: by a signal."""
        self.codes = self.wait_codes(timeout)
        wrong = [code for code in self.codes if code not in (expected or (0,))]
        assert not wrong, f"exit codes {self.codes}, expected {expected or (0,)}\n{self.output}"
        return self


class Forks:
    """A Python process that has imported the heavy packages and forks a child for each command."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in NO_PLACE}
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, **ENVIRONMENT},
            start_new_session=True,
        )
        self._asking = threading.Lock()
        atexit.register(self.close)

    def close(self) -> None:
        """End the server; it kills what still runs."""
        if self._server.poll() is None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(20)

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        with self._asking:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
        assert answer, "the fork server has ended"
        return json.loads(answer)

    def poll(self, pid: int) -> int | None:
        """The exit code of a process of a job, None while it runs."""
        code: int | None = self._ask(poll=pid)
        return code

    def start(
        self,
        folder: Path,
        *arguments: str,
        ranks: int = 1,
        crash: int | None = None,
        full: int | None = None,
        **environment: str,
    ) -> Job:
        """Begin `rlhf <arguments>` in `folder`, in one process or one a rank.

        With `crash` the first rank kills itself just before its crash-th change of the run's files; from its full-th
        on it finds the disk full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        places: list[dict[str, str]] = [{}]
        if ranks > 1:
            group = {
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
            }
            places = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        logs = [_new_log(folder) for _ in places]
        pids = [
            self._ask(
                run=list(arguments),
                folder=str(folder),
                log=str(log),
                environment={**place, **environment},
                crash=None if i else crash,
                full=None if i else full,
            )
            for i, (place, log) in enumerate(zip(places, logs, strict=True))
        ]

        def wait_codes(timeout: float) -> list[int]:
            codes: dict[int, int | None] = dict.fromkeys(pids)
            until = time.monotonic() + timeout
            while None in codes.values():
                for pid in [pid for pid, code in codes.items() if code is None]:
                    codes[pid] = self.poll(pid)
                if time.monotonic() > until:
                    for pid in [pid for pid, code in codes.items() if code is None]:
                        os.kill(pid, signal.SIGKILL)
                    raise AssertionError(f"still running after {timeout} s: {arguments}\n{job.output}")
                time.sleep(0.005)
            return [code for code in codes.values() if code is not None]

        job = Job(pids=pids, wait_codes=wait_codes, logs=logs)
        return job

    def run(self, folder: Path, *arguments: str, ranks: int = 1, code: int = 0, **environment: str) -> Job:
        """`rlhf <arguments>` to its end, which must be `code` in every rank."""
        return self.start(folder, *arguments, ranks=ranks, **environment).wait(code)


@functools.cache
def forks() -> Forks:
    """The fork server of this test process."""
    return Forks()


def program(folder: Path, *arguments: str) -> Job:
    """Begin `python -m rlhf_pipeline <arguments>` in a fresh interpreter and a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    log = _new_log(folder)
    environment = {k: v for k, v in os.environ.items() if k not in NO_PLACE}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_pipeline", *arguments],
            cwd=folder,
            env={**environment, **ENVIRONMENT},
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )

    def wait_codes(timeout: float) -> list[int]:
        try:
            return [process.wait(timeout)]
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.wait()
            raise AssertionError(f"still running after {timeout} s: {arguments}\n{job.output}") from None

    job = Job(pids=[process.pid], wait_codes=wait_codes, logs=[log])
    return job


def launched(folder: Path, num_processes: int, *arguments: str) -> Job:
    """Begin `rlhf launch --num-processes N <arguments>`; `children` finds the ranks."""
    return program(folder, "launch", "--num-processes", str(num_processes), *arguments)


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that are alive, in the order of their start."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return sorted(int(child) for child in found.read_text().split()) if found.exists() else []


def kill_tree(pid: int) -> None:
    """SIGKILL to a process that a test started and to its children."""
    for one in [*children(pid), pid]:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(what: Callable[[], Any], job: Job | None = None, *, timeout: float = TIMEOUT, pause: float = 0.001) -> Any:
    """The first true value of `what()`; gives up when none of the job's processes is left."""
    until = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < until, f"waited {timeout} s in vain\n{job.output if job else ''}"
        if job is not None and not any(is_alive(pid) for pid in job.pids):
            return what()
        time.sleep(pause)
    return found


def logged_steps(run: Path) -> int:
    """The number of the last step in a run's metrics.jsonl, 0 where there is none; a torn last line does not count."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines), default=0)


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Documents of 2 to 30 words."""
    rng = random.Random(seed)
    return [{"text": sentence(rng, 2, 30)} for _ in range(count)]


def dialogues(count: int, seed: int = 0, *, turns: int = 2) -> list[dict[str, Any]]:
    """`messages` rows of 1 to `turns` questions with answers of 1 to 25 words; the question is numbered, so unique."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        messages = []
        for turn in range(rng.randint(1, turns)):
            messages.append({"role": "user", "content": f"{i} {turn} {sentence(rng, 1, 8)}?"})
            messages.append({"role": "assistant", "content": sentence(rng, 1, 25)})
        rows.append({"messages": messages})
    return rows


def rankings(count: int, seed: int = 0, *, most: int = 9) -> list[dict[str, Any]]:
    """Rows of 2 to `most` answers of 3 to 12 words, liked for each word on colours and animals; so there are ties."""
    rng = random.Random(seed)
    liked = {"red", "blue", "cat", "dog"}
    answers = [[sentence(rng, 3, 12) for _ in range(rng.randint(2, most))] for _ in range(count)]
    scores = [[float(sum(word in liked for word in text.split())) for text in texts] for texts in answers]
    prompts = [f"{i} {sentence(rng, 1, 8)}?" for i in range(count)]
    columns = zip(prompts, answers, scores, strict=True)
    return [{"prompt": prompt, "responses": texts, "scores": values} for prompt, texts, values in columns]


def verdicts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Feedback rows: an answer of 3 to 12 words to each prompt, wanted where it has a word on colours or animals."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        prompt, answer = f"{i} {sentence(rng, 1, 8)}?", sentence(rng, 3, 12)
        rows.append(
            {"prompt": prompt, "response": answer, "label": bool({"red", "blue", "cat", "dog"} & {*answer.split()})}
        )
    return rows


def make_base(folder: Path, *, seed: int = 0, architecture: str = "llama", context: int = 256) -> Path:
    """A Hugging Face folder (no artifact): a tiny model with weights large enough to matter, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_pipeline.config.schema import TokenizerConfig
    from rlhf_pipeline.data.tokenizer import train_tokenizer, with_template

    rng = random.Random(5)
    corpus = [f"\n\nHuman: {sentence(rng, 2, 9)}?\n\nAssistant: {sentence(rng, 2, 20)}" for _ in range(60)]
    tokenizer = with_template(
        train_tokenizer(corpus, vocab_size=400, context=context), TokenizerConfig(template="dialogue")
    )
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "max_position_embeddings": context,
    }
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": context}
    torch.manual_seed(seed)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(architecture, vocab_size=400, initializer_range=0.1, **special, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of an artifact or a Hugging Face folder, by name."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def relative_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """||one - other|| / ||other|| over all tensors together."""
    assert one.keys() == other.keys()
    squares = [(float(((one[k] - other[k]).double() ** 2).sum()), float((other[k].double() ** 2).sum())) for k in one]
    return (sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5


def metrics(run: Path) -> list[dict[str, float]]:
    """Everything in metrics.jsonl that is not a timing."""
    from rlhf_pipeline.tracking.records import read_metrics

    return read_metrics(run / "metrics.jsonl", timings=False)


def series(run: Path, name: str) -> list[float]:
    """One metric, step by step."""
    return [line[name] for line in metrics(run) if name in line]


def assert_same_end(run: Path, undisturbed: Path) -> None:
    """Bit-identical final weights, the same metrics and the same samples or rewards."""
    assert metrics(run) == metrics(undisturbed)
    last = "evaluation.json" if undisturbed.name in ("rm", "dpo") else "samples.jsonl"
    for name in ("artifact/model.safetensors", last):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert files_below(run / "artifacts") == files_below(undisturbed / "artifacts")


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def states(run: Path) -> list[int]:
    """Steps whose resume states are in a run's folder."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "state").glob("step_*[0-9]"))


def copy_run(source: Path, target: Path) -> Path:
    """A copy of a run's folder that shares no file with it."""
    shutil.copytree(source, target)
    return target


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _new_log(folder: Path) -> Path:
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    for number in itertools.count(len(list(logs.iterdir()))):
        with contextlib.suppress(FileExistsError):  # of a run that was started at the same time
            (logs / f"{number}.log").touch(exist_ok=False)
            return logs / f"{number}.log"
    raise AssertionError
