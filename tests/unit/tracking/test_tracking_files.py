"""Tracking: the files of a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_tracking import clean_environment, log_steps, open_plain

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.tracking import read_metrics, read_samples
from rlhf_pipeline.tracking import records as records_module
from rlhf_pipeline.tracking.records import cut_back


def test_metrics_file_holds_one_flat_object_a_line(tmp_path: Path) -> None:
    with open_plain(tmp_path) as tracker:
        tracker.log(1, {"train/loss": 0.5, "train/tokens": 7})
        # visible at once, not only after closing: a killed run keeps what it logged
        first = json.loads((tmp_path / "metrics.jsonl").read_text())
        tracker.log(1, {"eval/loss": 0.25})
    assert first.pop("time/elapsed") >= 0
    assert first == {"step": 1, "train/loss": 0.5, "train/tokens": 7}
    assert read_metrics(tmp_path / "metrics.jsonl", timings=False) == [
        {"step": 1, "train/loss": 0.5, "train/tokens": 7},
        {"step": 1, "eval/loss": 0.25},
    ]


def test_non_finite_values_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with open_plain(tmp_path) as tracker:
        tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1 + 0.2})
        tracker.summary({"a": math.nan})
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(line, parse_constant=refuse)
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse) == {"a": "nan"}
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 0.1 + 0.2)


def test_two_logs_compare_equal_without_timings_even_with_nan(tmp_path: Path) -> None:
    rows = []
    for name, seconds in (("first", 1.0), ("second", 2.0)):
        with open_plain(tmp_path / name) as tracker:
            tracker.log(1, {"train/loss": math.nan, "time/seconds": seconds})
        rows.append(read_metrics(tmp_path / name / "metrics.jsonl", timings=False))
    assert rows[0] == rows[1]
    assert read_metrics(tmp_path / "first" / "metrics.jsonl")[0]["time/seconds"] == 1.0


def test_resumed_run_leaves_the_files_of_an_undisturbed_one(tmp_path: Path) -> None:
    with open_plain(tmp_path / "undisturbed") as tracker:
        log_steps(tracker, range(1, 7))
    broken = tmp_path / "broken"
    with open_plain(broken) as tracker:
        log_steps(tracker, range(1, 5))
        tracker.summary({"done": False})
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed in the middle of a line
    with open_plain(broken, restored_step=3) as tracker:
        assert [row["step"] for row in read_metrics(broken / "metrics.jsonl")] == [1, 2, 3]
        assert not (broken / "summary.json").exists()
        log_steps(tracker, range(4, 7))
    for run in ("undisturbed", "broken"):
        assert len(read_metrics(tmp_path / run / "metrics.jsonl")) == 6
    assert read_metrics(broken / "metrics.jsonl", timings=False) == read_metrics(
        tmp_path / "undisturbed" / "metrics.jsonl", timings=False
    )
    assert (broken / "samples.jsonl").read_bytes() == (tmp_path / "undisturbed" / "samples.jsonl").read_bytes()


def test_elapsed_counts_earlier_sessions(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/elapsed": 100.5}\n{"step": 2, "time/elapsed": 300}\n')
    with open_plain(tmp_path, restored_step=1) as tracker:
        tracker.log(2, {"train/loss": 1.0})
    assert 100.5 <= read_metrics(tmp_path / "metrics.jsonl")[-1]["time/elapsed"] < 160


def test_new_run_starts_with_empty_files(tmp_path: Path) -> None:
    with open_plain(tmp_path) as tracker:
        log_steps(tracker, range(1, 3))
    with open_plain(tmp_path, restored_step=None):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


def test_cut_back_keeps_bytes_and_drops_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step":1,   "odd":"spacing"}\n{"step": 2}\n'
    path.write_bytes(kept + b'\x00\x00\x00\n{"step": 3}\n[1]\n{"nostep": 1}\n{"step": 2')
    assert cut_back(path, restored_step=2) == 5
    assert path.read_bytes() == kept
    before = path.stat()
    assert cut_back(path, restored_step=2) == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert cut_back(tmp_path / "absent.jsonl", restored_step=2) == 0
    path.write_bytes(kept + b'{"step": 2}')  # whole but for its end: the next line would be glued to it
    assert cut_back(path, restored_step=2) == 1
    assert path.read_bytes() == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_crash_while_cutting_back_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    old = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(old)
    synced: list[int] = []
    real_fsync = os.fsync

    def record_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real_fsync(descriptor)

    def crash(source: Path, target: Path) -> None:
        assert synced == [len(b'{"step": 1}\n')], "the new content must be on disk before the rename"
        raise KeyboardInterrupt

    monkeypatch.setattr(records_module.os, "fsync", record_fsync)
    monkeypatch.setattr(records_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        cut_back(path, restored_step=1)
    assert path.read_bytes() == old


def test_reader_skips_a_torn_end_and_names_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged: b'nonsense"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"No absent\.jsonl in .* logged a step"):
        read_metrics(tmp_path / "absent.jsonl")


def test_samples_survive_any_text(tmp_path: Path) -> None:
    texts = ["line\nbreak", "\u2028 separator", "\x1b[31mred", "\ud800 lone surrogate", "nan", "\u4f60\u597d"]
    with open_plain(tmp_path) as tracker:
        tracker.samples(3, [{"prompt": text, "response": text} for text in texts])
    assert read_samples(tmp_path / "samples.jsonl") == [{"step": 3, "prompt": text, "response": text} for text in texts]


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    with open_plain(tmp_path) as tracker:
        tracker.log(1, {"a": 1.0})
        monkeypatch.setattr(
            records_module.os, "fsync", lambda fd: synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        )
        tracker.sync()
    assert synced == {"metrics.jsonl", "samples.jsonl"}


def test_step_is_not_a_metric_and_not_a_column(tmp_path: Path) -> None:
    with open_plain(tmp_path) as tracker:
        with pytest.raises(ValueError, match="'step' is not a metric"):
            tracker.log(1, {"step": 2.0})
        with pytest.raises(ValueError, match="'step' is not a column"):
            tracker.samples(1, [{"step": "2"}])


def test_other_processes_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    tracker = open_plain(run_dir, progress=True, wandb="online", tensorboard=True, is_main=False)
    with tracker:
        tracker.progress(1, 2)
        tracker.log(1, {"train/loss": 1.0})
        tracker.samples(1, [{"prompt": "a", "response": "b"}])
        tracker.info("hello")
        tracker.warn("hello")
        tracker.summary({})
        tracker.sync()
    assert not run_dir.exists()
    assert capfd.readouterr() == ("", "")


def test_imports_stay_cheap(tmp_path: Path) -> None:
    script = """
import sys
import rlhf_pipeline.tracking
from pathlib import Path
with rlhf_pipeline.tracking.open_tracker(
    run_dir=Path(sys.argv[1]), name="a", stage="b", config={}, wandb="disabled", wandb_project="",
    wandb_entity=None, tensorboard=False, progress=True, restored_step=None, is_main=True,
) as tracker:
    tracker.progress(1, 2)
    tracker.log(1, {"a": 1.0})
print(sorted({"wandb", "tensorboard", "torch", "rich", "numpy"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    out = subprocess.run(command, env=clean_environment(tmp_path), capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
