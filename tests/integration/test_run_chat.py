"""`rlhf chat` with its input piped: what goes to which stream, what it saves, how it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from helpers_runs import ENVIRONMENT


def test_a_piped_conversation(base: Path, tmp_path: Path) -> None:
    words = "/system be old\nthe red cat?\n\nwho sits?\n/save talk.jsonl\n/nothing\n/save\n"
    command = [sys.executable, "-m", "rlhf_pipeline", "chat", f"model.path={base}", "sampling.max_new_tokens=12"]
    done = subprocess.run(
        [*command, "runtime.threads=1"],
        cwd=tmp_path,
        input=words.encode(),
        capture_output=True,
        env={"PATH": "", **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    out, notes = done.stdout.decode(), done.stderr.decode()
    (row,) = (json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    assert len(answers) == 2 and all(answers)
    assert "\x1b" not in out + notes and "Traceback" not in notes
    assert len(out.rstrip("\n").split("\n")) >= 2
    for expected in ("the system message is set", "saved in talk.jsonl", "/nothing: no such command", "to which file?"):
        assert expected in notes
        assert expected not in out
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.json*"))
