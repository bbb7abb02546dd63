"""Tracking: real TensorBoard and wandb (in subprocesses: it keeps one service and one set of settings a process)."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_servers import Handler, serving
from helpers_tracking import HF_TOKEN, clean_environment, drive, open_plain, run_on_terminal
from PIL import Image

from rlhf_pipeline.tracking import read_metrics
from rlhf_pipeline.tracking.mirrors import WandbMirror


def test_tensorboard_purges_what_came_after_the_restored_step(tmp_path: Path) -> None:
    def run(restored_step: int | None, steps: range, scale: float) -> None:
        with open_plain(tmp_path, restored_step=restored_step, tensorboard=True) as tracker:
            for step in steps:
                tracker.log(step, {"train/loss": scale * step})

    run(None, range(1, 3), scale=7.0)  # an attempt that died before its first checkpoint
    run(None, range(1, 6), scale=1.0)
    run(3, range(4, 7), scale=10.0)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
        (6, 60.0),
    ]


def write_picture(path: Path, colour: tuple[int, int, int]) -> None:
    """3 wide, 2 high, one pixel marked so that a turned or mirrored picture is told from it."""
    picture = Image.new("RGB", (3, 2), colour)
    picture.putpixel((2, 0), (1, 254, 3))
    picture.save(path)


def test_tensorboard_shows_the_pictures_as_they_were_at_their_step(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"

    def run(restored_step: int | None, steps: range, red: int) -> None:
        with open_plain(tmp_path, restored_step=restored_step, tensorboard=True) as tracker:
            for step in steps:
                write_picture(path, (red + step, 0, 7))
                tracker.images(step, {"eval/reliability": path})

    run(None, range(1, 4), red=100)
    run(2, range(3, 5), red=200)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    pixels = {}
    for event in events.Images("eval/reliability"):
        with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            pixels[event.step] = [picture.getpixel((x, y)) for y in range(2) for x in range(3)]
    plain = {1: (101, 0, 7), 2: (102, 0, 7), 3: (203, 0, 7), 4: (204, 0, 7)}
    assert pixels == {step: [one, one, (1, 254, 3), one, one, one] for step, one in plain.items()}


# --- wandb


def history_of(path: Path) -> dict[int, dict[str, Any]]:
    """The history rows of an offline run file by step, without timings; of a table its content's hash.

    The file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB holding records with a checksum (4
    bytes), a length (2), and a kind (1 whole, 2 first part, 3 middle, 4 last), of protobuf content.
    """
    from wandb.proto import wandb_internal_pb2

    content, position, parts = path.read_bytes(), 7, b""
    rows: dict[int, dict[str, Any]] = {}
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts = (b"" if kind in (1, 2) else parts) + content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 4):
            continue
        record = wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
        if record.HasField("history"):
            items = {tuple(item.nested_key) or (item.key,): item.value_json for item in record.history.item}
            rows[int(items[("_step",)])] = {
                key[0]: json.loads(value)
                for key, value in items.items()
                if not key[0].startswith(("_", "time/")) and key[1:] in ((), ("sha256",))
            }
    return rows


def expected_history() -> dict[int, set[str]]:
    return {step: {"train/loss"} | ({"eval/loss", "samples"} if step % 2 == 0 else set()) for step in range(1, 9)}


def test_wandb_offline_run_is_complete_after_kill_and_resume(tmp_path: Path) -> None:
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    assert drive(tmp_path, str(undisturbed), "none", "0", "offline").returncode == 0
    assert drive(tmp_path, str(broken), "none", "5", "offline").returncode == -signal.SIGKILL
    (first_session,) = (broken / "wandb").glob("offline-run-*/*.wandb")
    secret = f"hub.token={HF_TOKEN}"  # an override on the command line
    assert drive(tmp_path, str(broken), "4", "0", "offline", secret).returncode == 0

    (complete,) = (undisturbed / "wandb").glob("offline-run-*/*.wandb")
    (resumed,) = (broken / "wandb").glob("offline-run-*/*.wandb")
    assert resumed.name == first_session.name, "the resumed session continues the same run id"
    wandb_id = json.loads((broken / "wandb.json").read_text())["wandb_id"]
    assert resumed.name == f"run-{wandb_id}.wandb"
    assert complete.name != resumed.name
    assert (broken / "wandb" / "superseded" / first_session.parent.name / first_session.name).exists()

    rows = history_of(resumed)
    assert {step: set(row) for step, row in rows.items()} == expected_history()
    assert rows == history_of(complete)
    assert rows[8]["eval/loss"] == 0.25
    assert read_metrics(broken / "metrics.jsonl", timings=False) == read_metrics(
        undisturbed / "metrics.jsonl", timings=False
    )
    assert not (tmp_path / "home").exists(), "everything stays in the run directory"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or HF_TOKEN.encode() not in file.read_bytes(), file


# Draws one file anew for each of 4 steps. Arguments: run directory, restored step or "none", the picture's folder.
PICTURES = """
import shutil, sys
from pathlib import Path
from rlhf_pipeline.tracking import open_tracker

run_dir, restored, pictures = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
restored_step = None if restored == "none" else int(restored)
with open_tracker(
    run_dir=run_dir, name="demo", stage="rm", config={}, wandb="offline", wandb_project="tests", wandb_entity=None,
    tensorboard=False, progress=False, restored_step=restored_step, is_main=True,
) as tracker:
    for step in range((restored_step or 0) + 1, 5):
        tracker.log(step, {"train/loss": 1 / step})
        shutil.copy(pictures / f"{step}.png", run_dir / "plot.png")
        tracker.images(step, {"eval/reliability": run_dir / "plot.png"})
        tracker.log(step, {"eval/accuracy": 0.5})
"""


def test_wandb_gets_the_pictures_as_they_were_at_their_step(tmp_path: Path) -> None:
    run_dir, hashes = tmp_path / "run", {}
    for step in range(1, 5):
        write_picture(tmp_path / f"{step}.png", (step, 0, 0))
        hashes[step] = hashlib.sha256((tmp_path / f"{step}.png").read_bytes()).hexdigest()

    def run(restored: str) -> tuple[dict[int, dict[str, Any]], set[str]]:
        done = subprocess.run(
            [sys.executable, "-c", PICTURES, str(run_dir), restored, str(tmp_path)],
            env=clean_environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")  # no warning of a mirror that was dropped
        (history,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
        files = history.parent.glob("files/media/images/eval/*.png")
        return history_of(history), {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def row(step: int) -> dict[str, Any]:
        return {"train/loss": 1 / step, "eval/accuracy": 0.5}

    rows, files = run("none")
    assert rows == {step: row(step) | {"eval/reliability": hashes[step]} for step in range(1, 5)}
    assert files == set(hashes.values())
    rows, files = run("2")  # metrics are sent again from the run's files; pictures of steps 1 and 2 are not
    assert rows == {1: row(1), 2: row(2)} | {step: row(step) | {"eval/reliability": hashes[step]} for step in (3, 4)}
    assert files == {hashes[3], hashes[4]}


class FakeWandb(Handler):
    """As much of the wandb server as a run needs: it creates and resumes runs and collects their history."""

    histories: dict[str, list[str]]
    protocol_version = "HTTP/1.1"

    def answer(self, content: object) -> None:
        self.reply(200, content, {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        request = (
            json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}") if "sdk" not in self.path else {}
        )
        if self.path.startswith("/graphql"):
            self.answer(self.graphql(request["query"], request.get("variables") or {}))
            return
        if self.path.endswith("/file_stream"):
            history = self.histories[self.path.split("/")[4]]
            for name, part in (request.get("files") or {}).items():
                if "history" in name:
                    history[part["offset"] :] = part["content"]
        self.answer({})

    def graphql(self, query: str, variables: dict[str, Any]) -> object:
        entity = {"id": "e", "name": "team"}
        name = variables.get("name")
        if "RunResumeStatus" in query:
            rows = self.histories.get(str(name))
            found: object = rows and {
                "id": "r",
                "name": name,
                "historyLineCount": len(rows),
                "eventsLineCount": 0,
                "logLineCount": 0,
                "historyTail": json.dumps(rows[-1:]),
                "eventsTail": "[]",
                "summaryMetrics": rows[-1],
                "config": "{}",
                "wandbConfig": '{"t": 1}',
                "tags": [],
            }
            return {"data": {"model": {"id": "m", "name": "tests", "entity": entity, "bucket": found or None}}}
        if "UpsertBucket" in query:
            rows = self.histories.setdefault(str(name), [])
            project = {"id": "p", "name": "tests", "entity": entity}
            bucket = {
                "id": "r",
                "name": name,
                "displayName": "d",
                "config": "{}",
                "historyLineCount": len(rows),
            }
            return {"data": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": not rows}}}
        if "Viewer" in query:
            return {"data": {"viewer": {"id": "v", "entity": "team", "username": "u", "flags": "{}"}}}
        return {"data": None, "errors": [{"message": "not part of the fake"}]}


@pytest.fixture
def wandb_server() -> Iterator[tuple[str, dict[str, list[str]]]]:
    FakeWandb.histories = {}
    with serving(FakeWandb) as url:
        yield url, FakeWandb.histories


def test_wandb_online_run_is_continued_without_repeating_steps(
    tmp_path: Path, wandb_server: tuple[str, dict[str, list[str]]]
) -> None:
    url, histories = wandb_server
    run_dir = tmp_path / "run"
    account = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}
    # the first session is without wandb, so the second has its steps to send as well
    assert drive(tmp_path, str(run_dir), "none", "4", "disabled").returncode == -signal.SIGKILL
    second = drive(tmp_path, str(run_dir), "4", "0", "online", **account)
    assert second.returncode == 0
    assert f"wandb: {url}/team/tests/runs/sft-" in second.stderr
    ((wandb_id, history),) = histories.items()
    assert [json.loads(row)["_step"] for row in history] == list(range(1, 9))
    # the server lost the last two steps, and the run goes back to step 4: 5 and 6 are there, 7 and 8 are not
    sent = list(history)
    del history[6:]
    history.append('{"_step": 6, "marker": 1}')  # kept only if step 6 is not sent a second time
    assert drive(tmp_path, str(run_dir), "4", "0", "online", **account).returncode == 0
    assert list(histories) == [wandb_id], "one wandb run"
    assert [json.loads(row)["_step"] for row in history] == [1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert history[:6] == sent[:6]
    kept = [{k: v for k, v in json.loads(row).items() if k in ("train/loss", "eval/loss")} for row in history[7:]]
    assert kept == [{"train/loss": 1 / 7}, {"train/loss": 1 / 8, "eval/loss": 0.25}]


def test_wandb_is_not_sent_what_it_has() -> None:
    sent: list[tuple[int, dict[str, Any]]] = []
    mirror: Any = WandbMirror.__new__(WandbMirror)
    mirror._first_step = 7
    mirror._table = lambda columns, data: (columns, data)
    mirror._image = lambda path: f"picture of {path}"
    mirror._run = SimpleNamespace(log=lambda values, step: sent.append((step, values)))
    for step in (6, 7):
        mirror.log(step, {"a": 1.0})
        mirror.samples(step, [{"prompt": "p", "response": "r"}])
        mirror.images(step, {"eval/plot": Path("plot.png")})
    mirror.samples(8, [])
    mirror.images(8, {})
    assert sent == [
        (7, {"a": 1.0}),
        (7, {"samples": (["prompt", "response"], [["p", "r"]])}),
        (7, {"eval/plot": "picture of plot.png"}),
    ]


def test_wandb_without_a_login_warns_once_and_never_asks(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shown = run_on_terminal(tmp_path, [str(run_dir), "none", "0", "online"])
    assert shown.count("warning: wandb (online) is off for this run: UsageError: No API key configured.") == 1
    assert "Enter your choice" not in shown
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")][-1] == 8
