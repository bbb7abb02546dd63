"""Config sections to data sets: mixtures, held-out sources, the lab, the hub, and tokenizers trained on the text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.config.ranking import NormaliseConfig
from rlhf_pipeline.config.schema import (
    DataConfig,
    LabConfig,
    LongResponse,
    LossOn,
    MixConfig,
    ModelConfig,
    OnBadRow,
    Rankings,
    ShapeConfig,
)
from rlhf_pipeline.config.stages import PretrainConfig, RmConfig
from rlhf_pipeline.data import hub, lab_files, prepare, stage
from rlhf_pipeline.data.order import Part
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.errors import UserError

WriteRows = Callable[..., str]


def pairs(first: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Is {i} odd?", "response": "Yes." if i % 2 else "No."} for i in range(first, first + count)]


def config(tmp_path: Path, train: Any, **changes: Any) -> DataConfig:
    settings = {"max_length": 64, "max_prompt_length": 48, "cache_dir": str(tmp_path / "cache"), "workers": 1}
    return DataConfig(train=train, **{**settings, **changes})


def trains(data: DataConfig, renderer: Renderer, **options: Any) -> Any:
    return prepare.train_and_heldout(data, renderer, **{"kind": "demonstration", "seed": 0, **options})


def caches(data: DataConfig) -> set[str]:
    return {path.name for path in Path(data.cache_dir).glob("*.arrow")}


def test_sources_of_several_formats_with_weights(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    plain = write_rows(*pairs(0, 20), name="plain.jsonl")
    alpaca = write_rows(
        *({"instruction": f"Say {i}", "input": "", "output": f"{i}"} for i in range(10)), name="a.jsonl"
    )
    own = write_rows(*({"question": f"Why {i}?", "answer": "So."} for i in range(4)), name="own.jsonl")
    columns = {"prompt": "question", "response": "answer"}
    train = [plain, {"path": alpaca, "weight": 0.5}, {"path": own, "weight": 3, "columns": columns}]
    data = config(tmp_path, train, heldout=write_rows(*pairs(500, 3), name="heldout.jsonl"))
    trained, heldout = trains(data, renderer)
    assert [share.name for share in trained.shares] == [plain, alpaca, own]
    assert trained.parts == (Part(20, 1), Part(10, 0.5), Part(4, 3)) and heldout.parts == (Part(3, 1),)
    assert trained.counts.rows == 34 and trained.counts.trees == len(trained) == 34
    assert trained.counts.tokens == trained.lengths.sum()
    assert [trained.origin(i) for i in (0, 20, 30)] == [f"{path}:1" for path in (plain, alpaca, own)]
    assert trained.sources.tolist() == [0] * 20 + [1] * 10 + [2] * 4
    assert "Why 3?" in renderer.tokenizer.decode(trained[33].prompt) and trained[33].index == 33
    # Each source has a file of its own, so that another mixture of them tokenises nothing.
    before = caches(data)
    again, _ = trains(config(tmp_path, [{"path": own, "columns": columns}, plain], heldout=data.heldout), renderer)
    assert caches(data) == before and len(before) == 4
    assert again.fingerprint != trained.fingerprint and len(again) == 24


def test_one_source_is_as_it_was_without_weights(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    """A run that began before mixtures existed goes on."""
    from rlhf_pipeline.data.dataset import Source, build
    from rlhf_pipeline.data.encode import Lengths

    path = write_rows(*pairs(0, 20))
    lengths = Lengths(max_length=64, max_prompt_length=48, long_prompt="drop", long_response="cut")
    alone = build(Source(path=path, kind="demonstration"), renderer, lengths, cache_dir=tmp_path / "cache")
    data = prepare.data_set(path, config(tmp_path, path), renderer, kind="demonstration", seed=0)
    assert data.fingerprint == alone.fingerprint and data.parts == (Part(20, 1),)


def test_a_split_leaves_each_source_in_its_place(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    one, two = write_rows(*pairs(0, 30), name="1.jsonl"), write_rows(*pairs(15, 30), name="2.jsonl")
    data = config(tmp_path, [{"path": one, "weight": 2}, two], heldout_fraction=0.3)
    trained, heldout = trains(data, renderer)
    assert set(trained.groups) & set(heldout.groups) == set()  # by prompt over both: 15 are in each
    sizes = [part.size for part in trained.parts]
    assert sum(sizes) == len(trained) and all(0 < size < 30 for size in sizes)
    assert [part.weight for part in trained.parts] == [2, 1]
    for i in range(len(trained)):
        assert trained.origin(i).startswith((one, two)[trained.sources[i]])


def test_max_examples_and_bad_rows_are_of_each_source(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    one, two = write_rows(*pairs(0, 9), name="1.jsonl"), write_rows(b"{oops", *pairs(50, 9), name="2.jsonl")
    data = config(tmp_path, [one, two], max_examples=4, on_bad_row=OnBadRow.skip, heldout=one)
    trained, _ = trains(data, renderer)
    assert [share.counts.rows for share in trained.shares] == [4, 4] and len(trained) == 7
    assert trained.counts.bad == {"not JSON": 1} and trained.bad_rows[0].startswith(f"{two}:1: ")


def test_weights_that_have_no_meaning_are_refused(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows(*pairs(0, 5))
    weighed = {"path": path, "weight": 2}
    with pytest.raises(UserError, match=r"data\.heldout: the weight of .* has no meaning"):
        trains(config(tmp_path, path, heldout=[path, weighed]), renderer)
    with pytest.raises(UserError, match=r"mix\.train: the weight of "):
        prepare.mixed_in(MixConfig(train=weighed), config(tmp_path, path), renderer)
    with pytest.raises(UserError, match=r"of its 5 examples a weight of 0\.1 leaves none"):
        trains(config(tmp_path, {"path": path, "weight": 0.1}, heldout=path), renderer)


def test_a_held_out_set_that_is_trained_on_is_warned_of(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(*pairs(0, 8), name="train.jsonl")
    clean = write_rows(*pairs(100, 3), name="clean.jsonl")
    leaky = write_rows(*pairs(100, 3), *pairs(6, 2), name="leaky.jsonl")
    trains(config(tmp_path, path, heldout=clean), renderer)
    assert caplog.text == ""
    trains(config(tmp_path, path, heldout=leaky), renderer)
    assert "the prompts of 2 of its 5 examples are in data.train as well" in caplog.text
    assert f"{leaky}:4 = {path}:7" in caplog.text


def test_text_is_mixed_in_with_its_own_settings(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    """The format, columns and number of rows of the demonstrations say nothing about it."""
    path = write_rows(*({"text": "The sky is blue."} for _ in range(9)))
    data = config(tmp_path, path, format="prompt_response", columns={"prompt": "q"}, max_examples=2)
    assert len(prepare.mixed_in(MixConfig(train=path), data, renderer)) == 9


# Rankings


def ranking(i: int, *, scores: tuple[int, ...] = (1, 3, 2)) -> dict[str, Any]:
    return {"prompt": f"Is {i} odd?", "responses": ["No.", "Yes.", "Perhaps."][: len(scores)], "scores": list(scores)}


def texts(renderer: Renderer, data: Any) -> list[tuple[str, ...]]:
    """Prompt and responses of each tree."""
    return [
        tuple(renderer.tokenizer.decode(part, skip_special_tokens=True).strip() for part in (t.prompt, *t.responses))
        for t in data
    ]


@pytest.mark.parametrize("own", [False, True])
def test_training_in_pairs_leaves_held_out_rankings_whole(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path, own: bool
) -> None:
    """And on the same side as without it, so that figures on them can be compared."""
    path = write_rows(*(ranking(i % 30, scores=(2, 2, 2) if i == 7 else (1, 3, 2)) for i in range(40)))
    heldout = write_rows(*(ranking(i) for i in range(100, 110)), name="heldout.jsonl") if own else None
    data = config(tmp_path, path, heldout=heldout, heldout_fraction=0.3)
    whole, whole_out = trains(data, renderer, kind="ranking")
    data.rankings = Rankings.pairs
    pairs, out = trains(data, renderer, kind="ranking")
    assert texts(renderer, out) == texts(renderer, whole_out) and all(len(tree.responses) == 3 for tree in out)
    assert set(pairs.groups.tolist()) == {whole.groups[i] for i in range(len(whole)) if whole[i].ranks.max() > 0}
    assert not set(pairs.groups.tolist()) & set(out.groups.tolist())
    assert all(tree.ranks.tolist() == [0, 1] for tree in pairs)
    assert len(pairs) == 3 * sum(tree.ranks.max() > 0 for tree in whole)
    assert pairs.parts == (Part(len(pairs), 1),)
    # Of another kind the setting says nothing.
    assert len(trains(data, renderer)[0]) == len(whole)


def test_a_reward_model_reads_rankings(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows(*(ranking(i) for i in range(20)))
    settings = RmConfig(data=config(tmp_path, path, heldout_fraction=0.2))
    sets, heldout = stage.data_sets(settings, renderer)
    assert list(sets) == ["rankings"] and stage.KINDS["rankings"] == "ranking"
    assert len(sets["rankings"]) + len(heldout) == 20
    settings.batch.examples = 4
    assert stage.batch_order(settings, sets["rankings"]).num_steps == -(-len(sets["rankings"]) // 4)


def test_the_preferred_answers_are_read_to_normalise(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    """Bad rows and long ones are left out, whatever the policy: the rankings have told of them, or stopped."""
    rows = [ranking(0), {"prompt": 3}, ranking(1, scores=(2, 2, 1)), {**ranking(2), "prompt": "~" * 60}, ranking(3)]
    rows[4]["responses"][1] = "~" * 60
    path = write_rows(*rows, *(ranking(i) for i in range(10, 20)))
    data = config(tmp_path, path, loss=LossOn.all, rankings=Rankings.pairs, long_response=LongResponse.error)
    settings = RmConfig(data=data, normalise=NormaliseConfig(examples=5))
    found = stage.demonstrations_to_normalise(settings, renderer)
    assert [answer for _, answer in texts(renderer, found)] == ["Yes.", "No."]  # the best; the first of two best
    assert found.counts.rows == 5 and sum(found.counts.bad.values()) == 1
    assert (found.counts.dropped_long_prompt, found.counts.dropped_long_response) == (1, 1)
    assert all(scored.all() for tree in found for scored in tree.scored) and len(found[0].prompt) > 5
    settings.normalise.examples = 100
    assert len(stage.demonstrations_to_normalise(settings, renderer)) == 12
    settings.data.max_examples = 1
    assert len(stage.demonstrations_to_normalise(settings, renderer)) == 1


def test_so_many_examples_to_normalise_of_all_sources_together(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    """Whatever their weights: as few rows of one as are read here may be none an epoch."""
    paths = [write_rows(*(ranking(100 * n + i) for i in range(8)), name=f"{n}.jsonl") for n in range(3)]
    train = [paths[0], {"path": paths[1], "weight": 0.2}, {"path": paths[2], "weight": 3, "format": "kwise"}]
    settings = RmConfig(data=config(tmp_path, train), normalise=NormaliseConfig(examples=4))
    found = stage.demonstrations_to_normalise(settings, renderer)
    assert len(found) == 4 and found.counts.rows == 12
    assert [found.origin(i).removeprefix(str(tmp_path)) for i in range(4)] == [
        "/0.jsonl:1", "/0.jsonl:4", "/1.jsonl:4", "/2.jsonl:4",
    ]  # fmt: skip
    assert sum(share.weight for share in found.shares) == 3


def test_demonstrations_of_their_own_to_normalise(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    """What is said of the rows of data.train does not hold for them; a bad one is as bad as any other."""
    rows = [{"q": f"{i}?", "responses": ["Yes.", "No."], "scores": [1, 2]} for i in range(4)]
    own = write_rows(*({"prompt": f"Why {i}?", "response": "So."} for i in range(6)), name="own.jsonl")
    data = config(tmp_path, write_rows(*rows), columns={"prompt": "q"}, format="kwise", max_examples=2)
    settings = RmConfig(data=data, normalise=NormaliseConfig(train=own, examples=5))
    found = stage.demonstrations_to_normalise(settings, renderer)
    assert len(found) == 5 and {answer for _, answer in texts(renderer, found)} == {"So."}
    settings.normalise = NormaliseConfig(train={"path": own, "weight": 2})
    with pytest.raises(UserError, match=r"normalise\.train: the weight of "):
        stage.demonstrations_to_normalise(settings, renderer)
    settings.normalise = NormaliseConfig(train=write_rows(*pairs(0, 3), {"prompt": "Why?"}, name="bad.jsonl"))
    with pytest.raises(UserError, match=r"1 of 4 rows of .*bad\.jsonl"):
        stage.demonstrations_to_normalise(settings, renderer)


# The lab


def test_lab_sets_are_files_named_for_all_they_depend_on(tmp_path: Path) -> None:
    from rlhf_pipeline.data.lab.sets import rows

    path = lab_files.local_path("lab:demonstrations", LabConfig(demonstrations=5, seed=3), tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(rows("demonstrations", count=5, seed=3))
    others = {
        lab_files.local_path("lab:demonstrations", LabConfig(demonstrations=5, seed=4), tmp_path),
        lab_files.local_path("lab:demonstrations", LabConfig(demonstrations=6, seed=3), tmp_path),
        lab_files.local_path("lab:rankings", LabConfig(rankings=5, seed=3), tmp_path),
    }
    assert len({path, *others}) == 4 and len(list(path.parent.iterdir())) == 4
    changed = path.stat().st_mtime_ns
    assert lab_files.local_path("lab:demonstrations", LabConfig(demonstrations=5, seed=3), tmp_path) == path
    assert path.stat().st_mtime_ns == changed
    with pytest.raises(UserError, match=r"lab:nothing: no such set; there are lab:documents"):
        lab_files.local_path("lab:nothing", LabConfig(), tmp_path)


def test_lab_sets_are_read(renderer: Renderer, tmp_path: Path) -> None:
    lab = LabConfig(demonstrations=6, heldout_demonstrations=3)
    data = config(
        tmp_path, "lab:demonstrations", heldout="lab:heldout_demonstrations", lab=lab, max_length=400,
        max_prompt_length=300,
    )  # fmt: skip
    trained, heldout = trains(data, renderer)
    assert (len(trained), len(heldout)) == (6, 3) and trained.shares[0].name == "lab:demonstrations"


# The hub


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """on_hub(rows, ...) makes owner/name a data set of files with these rows; it returns the list of openings."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    original = datasets.load_dataset_builder

    def make(*files: list[dict[str, Any]]) -> list[str]:
        folder = tmp_path / "served"
        folder.mkdir(exist_ok=True)
        for number, rows in enumerate(files):
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        opened: list[str] = []

        def load_dataset_builder(name: str) -> Any:
            opened.append(name)
            if name != "owner/name":
                raise FileNotFoundError(f"{name} is not on the hub")
            return original(str(folder), cache_dir=str(tmp_path / "datasets"))

        monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
        return opened

    return make


def fetched(tmp_path: Path, count: int) -> list[Any]:
    files = hub.first_rows("owner/name", split="train", count=count, cache_dir=tmp_path)
    import gzip

    return [json.loads(line) for file in files for line in gzip.open(file, "rt")]


def test_first_rows_of_the_hub_are_kept(
    on_hub: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ROWS_A_FILE", 8)
    rows = pairs(0, 50)
    opened = on_hub(rows[:15], rows[15:])
    assert fetched(tmp_path, 20) == rows[:20]
    assert [file.name for file in sorted((tmp_path / "hub/owner--name@train-20").glob("rows*"))] == [
        f"rows-0000{i}.jsonl.gz" for i in range(3)
    ]
    assert fetched(tmp_path, 20) == rows[:20] and len(opened) == 1  # not asked again
    assert fetched(tmp_path, 16) == rows[:16] and fetched(tmp_path, 90) == rows  # another number is another folder
    complete = json.loads((tmp_path / "hub/owner--name@train-90" / hub.COMPLETE).read_text())
    assert (complete["repository"], complete["rows"]) == ("owner/name", 50) and complete["revision"]
    with pytest.raises(UserError, match=r"owner/other: cannot be streamed .* owner/other is not on the hub"):
        hub.first_rows("owner/other", split="train", count=5, cache_dir=tmp_path)
    with pytest.raises(UserError, match="cannot be streamed"):
        hub.first_rows("owner/name", split="nosuch", count=5, cache_dir=tmp_path)


def test_an_interrupted_download_goes_on_after_its_last_file(
    on_hub: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ROWS_A_FILE", 8)
    rows = pairs(0, 50)
    on_hub(rows[:15], rows[15:])
    original, written = hub._write, []

    def write(file: Path, supply: Any) -> int:
        if len(written) == 2:
            next(supply)
            raise ConnectionError("the line is dead")
        written.append(file.name)
        return original(file, supply)

    monkeypatch.setattr(hub, "_write", write)
    with pytest.raises(UserError, match=r"broke off after 16 rows were kept: ConnectionError: the line is dead"):
        fetched(tmp_path, 40)
    monkeypatch.setattr(hub, "_write", lambda file, supply: written.append(file.name) or original(file, supply))
    assert fetched(tmp_path, 40) == rows[:40]
    assert written == [f"rows-0000{i}.jsonl.gz" for i in range(5)]  # none of them twice


def test_rows_of_two_versions_are_not_mixed(
    on_hub: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ROWS_A_FILE", 8)
    on_hub(pairs(0, 30))
    original = hub._write

    def write(file: Path, supply: Any) -> int:
        if file.name == "rows-00001.jsonl.gz":
            raise ConnectionError
        return original(file, supply)

    monkeypatch.setattr(hub, "_write", write)
    with pytest.raises(UserError):
        fetched(tmp_path, 20)
    monkeypatch.setattr(hub, "_write", original)
    on_hub(pairs(100, 30))  # the repository has changed meanwhile
    assert fetched(tmp_path, 20) == pairs(100, 20)


def test_streaming_reads_the_kept_rows(
    on_hub: Callable[..., list[str]], renderer: Renderer, tmp_path: Path, write_rows: WriteRows
) -> None:
    opened = on_hub(pairs(0, 30))
    local = write_rows(*pairs(200, 3))
    data = config(tmp_path, ["owner/name", local], streaming=True, max_examples=12, heldout=local)
    trained, _ = trains(data, renderer)
    assert [part.size for part in trained.parts] == [12, 3] and trained.shares[0].name == "owner/name"
    assert trained.origin(11).endswith("hub/owner--name@train-12/rows-00000.jsonl.gz:12")
    again, _ = trains(data, renderer)
    assert again.fingerprint == trained.fingerprint and len(opened) == 1


def test_imports_of_prep_are_cheap() -> None:
    import subprocess

    code = (
        "import sys, rlhf_pipeline.recipes.prep; "
        "print(*{'torch', 'transformers', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# A tokenizer trained on the text


def test_an_own_tokenizer_is_made_once_and_anew_for_other_text(write_rows: WriteRows, tmp_path: Path) -> None:
    def made(path: str, vocab_size: int = 300) -> tuple[int, int]:
        """(vocabulary size, when the tokenizer was written)."""
        shape = ShapeConfig(vocab_size=vocab_size, context=64)
        settings = PretrainConfig(
            run_dir=str(tmp_path / "run"), model=ModelConfig(shape=shape), data=config(tmp_path, path)
        )
        settings.tokenizer.template = "dialogue"
        renderer = stage.open_renderer(settings)
        file = tmp_path / "run/tokenizer/tokenizer.json"
        return len(renderer.tokenizer), file.stat().st_mtime_ns

    path = write_rows(*({"text": f"The sky over {i} is blue and grey and blue."} for i in range(40)))
    first = made(path)
    assert made(path) == first
    larger = made(path, 310)
    assert larger[0] > first[0]
    write_rows(*({"text": f"Quite another sea of {i} green stones."} for i in range(40)))
    other = made(path, 310)
    assert other[1] != larger[1]
    (tmp_path / "run/state/step_00000001").mkdir(parents=True)  # a run has begun with this one
    assert made(path, 300) == other
