"""The process behind `helpers_runs.Forks`: imports what every run needs, then forks a child for each command.

One JSON request a line on stdin, one JSON answer a line on stdout. {"run": arguments, "folder", "log", "environment",
"crash", "full"} answers with the child's process id, {"poll": id} with its exit code (negative for a signal) or null
while it runs. Ends when stdin does, and kills the children that are left.

`crash` is a number k: the child kills itself with SIGKILL just before the k-th change that it makes to the files below
"runs" (opening for writing, renaming, linking, removing). The changes are listed in the log, so that k = 0 lists all.
`full` is such a number, from which on the disk is full: nothing can be made there, but renamed and removed.
INJECT in its environment names faults of faults/inject.py, which the child does to itself.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    _import_everything()
    running: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            pid = _fork(request)
            running[pid] = None
            answer: int | None = pid
        else:
            pid = request["poll"]
            if running[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                running[pid] = os.waitstatus_to_exitcode(status) if done else None
            answer = running[pid]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in [pid for pid, code in running.items() if code is None]:
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGKILL)


def _import_everything() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import filelock  # noqa: F401
    import hydra  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import pyarrow  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.integrations import deepspeed  # noqa: F401

    import rlhf_pipeline.cli
    import rlhf_pipeline.recipes.dpo
    import rlhf_pipeline.recipes.evaluate
    import rlhf_pipeline.recipes.generate
    import rlhf_pipeline.recipes.ppo
    import rlhf_pipeline.recipes.prep
    import rlhf_pipeline.recipes.pretrain
    import rlhf_pipeline.recipes.rm
    import rlhf_pipeline.recipes.score
    import rlhf_pipeline.recipes.sft  # noqa: F401
    from rlhf_pipeline.engine import quiet_deepspeed

    quiet_deepspeed()


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in enumerate((nothing, log, log)):
            os.dup2(source, target)
        if os.environ.get("INJECT"):
            importlib.import_module("faults.inject").begin(os.environ["INJECT"])
        if request["crash"] is not None or request["full"] is not None:
            _watch_changes(request["crash"], request["full"])
        code = _command_line(request["run"])
    finally:
        atexit._run_exitfuncs()  # as a fresh interpreter would at its end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch_changes(crash: int | None, full: int | None) -> None:
    changes = 0
    makes = ("open", "os.link", "os.mkdir")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(arguments[2], int) else False
        else:
            writes = event in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir")
        if writes and "/runs/" in str(arguments[0]) and "/cache/" not in str(arguments[0]):
            changes += 1
            os.write(2, f"change {changes}: {event} {arguments[0]}\n".encode())
            if changes == crash:
                os.kill(os.getpid(), signal.SIGKILL)
            made = os.fsdecode(arguments[1 if event == "os.link" else 0])
            if full is not None and changes >= full and event in makes and not Path(made).exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), made)

    sys.addaudithook(audit)


def _command_line(arguments: list[str]) -> int:
    """What `python -m rlhf_pipeline <arguments>` does, and its exit code."""
    from rlhf_pipeline.cli import app

    sys.argv = ["rlhf", *arguments]
    try:
        app(prog_name="rlhf")
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            sys.stderr.write(leaving.code + "\n")
            return 1
        return leaving.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
