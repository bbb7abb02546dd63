"""What the trials found, each in its smallest form."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from helpers_runs import make_base
from helpers_scoring import make_reward_model

from rlhf_pipeline import artifact, failures, resume
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.schema import ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, is_intact, sealed
from rlhf_pipeline.scoring.rewards import open_scorer


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    return make_reward_model(tmp_path / "reward", make_base(tmp_path / "base"), kind=Kind.reward_model)


def test_a_reward_model_without_its_tokenizer_is_a_damaged_artifact(reward: Path) -> None:
    """Its tokenizer was opened first, and complained of having no end token."""
    (reward / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config.json is missing; copy the whole folder"):
        open_scorer(ReadyModelConfig(path=str(reward)), TokenizerConfig(), "cpu")


def test_what_is_whole(reward: Path, tmp_path: Path) -> None:
    assert artifact.is_whole(reward)
    (reward / "README.md").write_text("edited")
    assert artifact.is_whole(reward)
    (reward / "config.json").write_text("{}")
    assert not artifact.is_whole(reward) and not artifact.is_whole(tmp_path)


def test_a_changed_digit_in_the_manifest_is_seen(reward: Path) -> None:
    """A reward model's scale, say; only the other files had checksums."""
    manifest = reward / "artifact.json"
    said = manifest.read_text()
    manifest.write_text(said.replace('"step": 1', '"step": 3'))
    with pytest.raises(UserError, match=r"artifact.json is damaged \(its checksum differs\)"):
        artifact.load(reward, kind=Kind.reward_model)
    manifest.write_text(said)
    assert artifact.load(reward, kind=Kind.reward_model).step == 1


def test_what_a_file_says_of_itself() -> None:
    """As it comes back from JSON, in which keys are texts and tuples lists."""
    value = {"b": (1, 0.1), "a": {3: None, "x": float("inf")}}
    read = json.loads(json.dumps(sealed(value)))
    assert is_intact(read) and sealed(read) == read
    assert not is_intact({**read, "b": [1, 0.2]}) and is_intact(value)


def test_a_changed_state_json_is_passed_over(tmp_path: Path) -> None:
    """A letter in the data's fingerprint: the run was refused for having other data, with no way out."""
    for step in (2, 4):
        folder = tmp_path / f"state/step_{step:08d}"
        folder.mkdir(parents=True)
        content = sealed({"format": resume.FORMAT, "step": step, "files": {}, "data": {"train": "f00d"}})
        (folder / "state.json").write_text(json.dumps(content).replace("f00d", "f10d" if step == 4 else "f00d"))
    state, warnings = resume.find(tmp_path)
    assert state is not None and state.step == 2
    assert len(warnings) == 1 and "step_00000004: damaged (state.json)" in warnings[0]


@pytest.mark.parametrize(
    ("error", "reason", "cure"),
    [
        (OSError(errno.EFBIG, "File too large"), "no file may become so large", "Raise that limit"),
        (RuntimeError("I/O error: File too large (os error 27)"), "no file may become so large", "Raise that limit"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full", "Make room"),
    ],
)
def test_a_limit_of_file_sizes_is_no_full_disk(error: Exception, reason: str, cure: str) -> None:
    with pytest.raises(UserError, match=rf"x: {reason}.* while saving it\. Kept\. {cure}"):  # noqa: SIM117
        with disk_errors("it", Path("x"), kept="Kept."):
            raise error


def told(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = failures.leave(error, "sft")
    return code, capsys.readouterr().err


def test_a_write_beyond_the_limit_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = told(OSError(errno.EFBIG, "File too large"), capsys)
    assert code == 2 and "no file may become so large" in said and "run the same command again" in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"),
        RuntimeError("Timed out waiting 60000ms for recv operation to complete\nframes"),
        ConnectionError("process 1 has given no sign of life for 60 s"),
    ],
)
def test_a_process_that_has_lost_the_others_says_so(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, said = told(error, capsys)
    assert code == 1 and "process 0 of 2 has lost the others" in said and "rank_timeout_minutes" in said
    assert "run the same command again" in said and "frames" not in said
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "lost the others" not in told(error, capsys)[1]
