"""The promises of docs/security.md that no other test keeps: what is loaded is not run, and secrets are not written.

Names that would lead out of a folder are refused in test_bad_configs.py and test_bad_artifacts.py, expressions of templates
in test_bad_data.py and test_bad_artifacts.py; the report's page is tests/unit/report/test_page.py's.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from helpers_runs import TINY_RUN, Forks, dialogues, files_below, write_jsonl

import rlhf_pipeline
from rlhf_pipeline.config.compose import examine
from rlhf_pipeline.config.schema import LabConfig, ModelConfig, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.config.stages import STAGES
from rlhf_pipeline.data import hub, lab_files
from rlhf_pipeline.data.tokenizer import open_tokenizer
from rlhf_pipeline.direct import reference
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import sha256, write_json
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.models.load import load_policy
from rlhf_pipeline.models.ready import open_model
from rlhf_pipeline.tracking.redaction import redact

PACKAGE = Path(rlhf_pipeline.__file__).parent
TOKEN = "hf_" + "AbCdEfGh12345678" * 2  # looks like one of the hub

# Modules and functions that run what they read.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "pty"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load", "pickle.load",
                "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "pd.read_pickle",
                "pandas.read_pickle"}  # fmt: skip


def faults(source: str) -> list[str]:
    """What a module does that could run what it reads, each with its line."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES]  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        found += [f"{node.lineno}: calls {name}"] if name in UNSAFE_CALLS else []
        on = [k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True]
        found += [f"{node.lineno}: {name}({k}=True)" for k in on if k in ("allow_pickle", "shell", "trust_remote_code")]
    return found


def test_nothing_here_runs_what_it_reads() -> None:
    found = {str(f.relative_to(PACKAGE)): faults(f.read_text(encoding="utf-8")) for f in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 150
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", ["1: imports pickle"]),
        ("from dill.x import y", ["1: imports dill"]),
        ("import torch\ntorch.load('x')", ["2: calls torch.load"]),
        ("np.load(f, allow_pickle=True)", ["1: np.load(allow_pickle=True)"]),
        ("run(line, shell=True)", ["1: run(shell=True)"]),
        ("model.eval()\nnp.load(f, mmap_mode='r')\nre.compile('x')", []),
    ],
)
def test_the_search_finds_what_it_looks_for(source: str, expected: list[str]) -> None:
    assert [line.replace("dill.x", "dill") for line in faults(source)] == expected


class Bomb:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What must not come into being."""
    path = tmp_path / "it has run"
    yield path
    assert not path.exists()


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_weights_that_are_a_pickle_are_not_run(mark: Path, base: Path, tmp_path: Path) -> None:
    """A plain Hugging Face folder may have them; they are read as data or not at all."""
    tokenizer = open_renderer(ReadyModelConfig(path=str(base)), TokenizerConfig()).tokenizer
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be opened as a causal language model"):
        open_model(ReadyModelConfig(path=str(folder)), tokenizer, "cpu")
    asked, cpu = ModelConfig(path=str(folder)), torch.device("cpu")
    with pytest.raises(UserError, match="cannot be opened as a causal language model"):
        load_policy(asked, tokenizer=tokenizer, seed=0, device=cpu, deepspeed_config=None)


def test_cached_numbers_that_are_a_pickle_are_not_run(mark: Path, tmp_path: Path) -> None:
    file, facts = tmp_path / "numbers.npy", {"version": reference.VERSION, "numbers": 1}
    np.save(file, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    write_json(file.with_suffix(".json"), {**facts, "sha256": sha256(file)})
    assert "the file cannot be read" in reference._problem(file, facts)


@pytest.mark.parametrize("what", ["tokenizer", "model"])
def test_code_that_comes_with_a_model_is_not_run(what: str, mark: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass C: pass\nclass M: pass\n")
    name = "tokenizer_config.json" if what == "tokenizer" else "config.json"
    settings = json.loads((folder / name).read_text())
    classes = {"AutoTokenizer": ["evil.C", "evil.C"]} if what == "tokenizer" else {"AutoConfig": "evil.C"}
    settings |= {"auto_map": classes, "model_type": "evil"} if what == "model" else {"auto_map": classes}
    (folder / name).write_text(json.dumps(settings))
    try:
        renderer = open_renderer(ReadyModelConfig(path=str(folder)), TokenizerConfig())
        open_model(ReadyModelConfig(path=str(folder)), renderer.tokenizer, "cpu")
    except UserError as error:
        assert what == "model" and "custom code" in str(error)
    else:
        assert what == "tokenizer"  # whose own class transformers knows


def test_code_that_is_trusted_is_announced(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_tokenizer(str(base), TokenizerConfig())
    assert not caplog.records
    open_tokenizer(str(base), TokenizerConfig(), trust_remote_code=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{base}: trust_remote_code is on: Python code that comes with this model is run"


# Every field of every config

Field = tuple[str, Any, Any]  # dotted name, type, default


def fields_of(section: type[Any], prefix: str = "", seen: tuple[type[Any], ...] = ()) -> Iterator[Field]:
    types = get_type_hints(section)
    for f in dataclasses.fields(section):
        kinds = [
            kind for kind in (types[f.name], *getattr(types[f.name], "__args__", ())) if dataclasses.is_dataclass(kind)
        ]
        for kind in kinds:
            if kind not in seen:
                yield from fields_of(kind, f"{prefix}{f.name}.", (*seen, kind))  # type: ignore[arg-type]
        if not kinds:
            yield f"{prefix}{f.name}", types[f.name], f.default


EVERY = {name: (kind, default) for stage in STAGES.values() for name, kind, default in fields_of(stage)}


def test_remote_code_is_off_unless_it_is_asked_for() -> None:
    found = {name: default for name, (_, default) in EVERY.items() if name.endswith("trust_remote_code")}
    assert len(found) >= 3 and not any(found.values())


def test_no_config_has_a_place_for_a_secret() -> None:
    """A secret is given by an environment variable, whose name a config may hold: command lines are seen by everyone."""
    given = {name.rpartition(".")[2]: "x" for name in EVERY}
    assert len(given) > 150
    hidden = {name for name, value in redact(given).items() if value != "x"}
    assert hidden == set()


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("evaluate", "judge.name=../../x"),
        ("evaluate", "judge.name=/tmp/x"),
        ("evaluate", "systems={../x:m}"),
        ("sft", "name=../../x"),
        ("sft", "name=/tmp/x"),
    ],
)
def test_no_name_leads_out_of_the_runs_folder(stage: str, override: str) -> None:
    more = ["kind=winrate"] if stage == "evaluate" else []
    assert any("slash" in problem for problem in examine(stage, [*more, override])[1])


def test_no_data_set_leads_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []
    monkeypatch.setattr(hub, "_fetch", lambda name, split, count, folder, progress: fetched.append(folder))
    hub.first_rows("owner/../x", split="../../../train[:1]", count=3, cache_dir=tmp_path)
    assert fetched[0].resolve().parent == (tmp_path / "hub").resolve()
    with pytest.raises(UserError, match="no such set"):
        lab_files.local_path("lab:../../x", LabConfig(), tmp_path)


def test_no_secret_is_written(rlhf: Forks, base: Path, tmp_path: Path) -> None:
    """A token that was given all the same is in none of the files of a run, and nowhere in what it says."""
    write_jsonl(tmp_path / "train.jsonl", dialogues(8))
    given = [f"model.path={base}", "data.train=train.jsonl", f"model.revision={TOKEN}", "train.max_steps=1"]
    sizes = ["data.max_length=160", "data.max_prompt_length=100", "batch.examples=4"]
    job = rlhf.run(tmp_path, "sft", *given, *sizes, *TINY_RUN)
    assert TOKEN not in job.output
    written = files_below(tmp_path / "runs")
    assert {"default/sft/artifact/artifact.json", "default/sft/config.yaml", "default/sft/run.json"} <= written
    assert not [name for name in written if TOKEN.encode() in (tmp_path / "runs" / name).read_bytes()]
    assert "revision: '***'" in (tmp_path / "runs/default/sft/config.yaml").read_text()
    with_mistake = rlhf.run(tmp_path, "sft", f"model.revison={TOKEN}", code=2)
    assert TOKEN not in with_mistake.output and "did you mean model.revision?" in with_mistake.output


def test_no_callable_is_left_to_the_config(refused: Callable[..., str]) -> None:
    """Hydra can build any object of a `_target_`; the schema has no such key anywhere."""
    for override in ("+model._target_=os.system", "+optim._target_=builtins.eval", "+_target_=os.system"):
        problems = examine("sft", ["data.train=x", "model.path=m", override])[1]
        assert any("there is no key" in problem for problem in problems), problems
