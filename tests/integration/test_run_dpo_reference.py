"""The reference of `rlhf dpo`: kept on disk, checked, of another model, and under adapters."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers_dpo import DPO, FILES, LIVE, QUICK, made, make_folder, manifest, plain, said
from helpers_runs import Forks, logged_steps, relative_difference, series, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("dpo_reference"))


def test_a_file_is_read_again_and_made_again_where_it_is_damaged(rlhf: Forks, folder: Path, base: Path) -> None:
    cached = made(rlhf, folder, base, "cached")
    keep = [*QUICK, "data.cache_dir=runs/damaged"]
    first = made(rlhf, folder, base, "fresh", *keep)
    files = sorted((folder / "runs/damaged/reference").glob("*.npy"))
    before = [file.stat().st_mtime_ns for file in files]
    again = made(rlhf, folder, base, "read", *keep)
    assert said(first).count(f"computing {FILES}") == 2 == len(files)
    assert said(again).count(FILES) == 2 and "computing" not in said(again)
    assert [file.stat().st_mtime_ns for file in files] == before
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-3] + b"\x00\x01\x02")
    mended = made(rlhf, folder, base, "mended", *keep)
    assert "examples again, for the file is damaged (its checksum differs)" in said(mended)
    assert said(mended).count("computing") == 1 and files[0].read_bytes() == content
    assert series(first, "train/loss") == series(again, "train/loss") == series(mended, "train/loss")
    assert series(first, "train/loss") == series(cached, "train/loss")[:2]


def test_numbers_of_other_weights_are_noticed(rlhf: Forks, folder: Path, base: Path) -> None:
    """A file whose checksum fits, of a reference that is a little off; nothing is learnt."""
    import hashlib

    made(rlhf, folder, base, "cached")
    shutil.copytree(folder / "runs/cache", folder / "runs/tampered")
    for file in (folder / "runs/tampered/reference").glob("*.npy"):
        np.save(file, np.load(file) - np.float32(0.01))
        told = json.loads(file.with_suffix(".json").read_text())
        told["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        file.with_suffix(".json").write_text(json.dumps(told))
    command = [*DPO, f"model.path={base}", "name=tampered", "data.cache_dir=runs/tampered"]
    job = rlhf.run(folder, *command, code=2)
    assert "the policy is its reference before the first update, and yet" in job.output
    assert "are 0.01 nats a token apart" in job.output
    assert "Remove the folder reference in runs/tampered, or set reference.cache=false" in job.output
    assert "Traceback" not in job.output
    assert not (folder / "runs/tampered_run").exists() and logged_steps(folder / "runs/tampered/dpo") == 0
    shutil.rmtree(folder / "runs/tampered/reference")
    rlhf.run(folder, *command, *QUICK)


def test_another_reference(rlhf: Forks, folder: Path, base: Path) -> None:
    """The first loss is not ln 2 then, and nobody asks for it; both parents are named."""
    run = made(rlhf, folder, base, "held_to_other", "reference.path=other", *QUICK)
    expected = plain(folder, base, run, reference=folder / "other", max_steps=2)
    assert series(run, "train/loss") == pytest.approx(expected.losses, abs=1e-5)
    assert abs(expected.losses[0] - math.log(2)) > 0.01
    assert {name: one["path"] for name, one in manifest(run)["parents"].items()} == {
        "model": str(base),
        "reference": "other",
    }


def test_adapters(rlhf: Forks, folder: Path, base: Path) -> None:
    """The reference is what lies under them, the same as without: its numbers are read. Cached and live are equal."""
    pytest.importorskip("peft", reason="needs the lora extra")
    made(rlhf, folder, base, "cached")
    lora = ["lora=default", "lora.rank=4", "optim.lr=3e-2", "train.max_steps=3"]
    cached = made(rlhf, folder, base, "lora", *lora)
    live = made(rlhf, folder, base, "lora_live", *lora, *LIVE)
    assert FILES in said(cached) and "computing" not in said(cached)
    assert series(cached, "eval/drift_chosen")[0] == pytest.approx(0, abs=1e-4) == series(live, "eval/drift_chosen")[0]
    assert abs(series(live, "eval/drift_chosen")[-1]) > 0.1
    for name in ("train/loss", "eval/loss", "eval/drift_chosen", "eval/drift_rejected"):
        assert series(cached, name) == pytest.approx(series(live, name), abs=2e-4), name
    assert relative_difference(weights(cached / "artifact"), weights(live / "artifact")) < 1e-4
    start = weights(base)
    changed = {name for name, one in weights(cached / "artifact").items() if not np.array_equal(one, start[name])}
    assert changed == {name for name in start if name.endswith("_proj.weight")}


def test_bf16_begins_where_its_reference_is(rlhf: Forks, folder: Path, base: Path) -> None:
    run = made(rlhf, folder, base, "bf16", "model.dtype=bfloat16", *QUICK)
    assert series(run, "train/loss")[0] == pytest.approx(math.log(2), abs=0.02)
