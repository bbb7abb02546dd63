from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pipeline.data import sources
from rlhf_pipeline.data.records import BadRow
from rlhf_pipeline.data.sources import fingerprint, read_rows
from rlhf_pipeline.errors import UserError


def read(path: Path | str | list[str], split: str = "train") -> list[tuple[str, Any]]:
    """(origin without its folders, value or reason) of every row."""
    rows = read_rows(str(path) if isinstance(path, Path) else path, split=split)
    return [(Path(row.origin).name, str(row.value) if isinstance(row.value, BadRow) else row.value) for row in rows]


LINES = [
    b'{"a": 1}\n',
    b"\n",
    b"{'a': 1}\n",
    b'{"a": "\xff"}\n',
    b"[1]\n",
    b'"text"\n',
    b"[" * 100_000 + b"\n",
    b'{"a": 2}',
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json"])
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + b"".join(LINES)  # with a byte order mark
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = read(tmp_path / name)
    assert [origin for origin, _ in rows] == [f"{name}:{line}" for line in (1, 3, 4, 5, 6, 7, 8)]
    values = [value for _, value in rows]
    assert values[0] == {"a": 1} and values[-1] == {"a": 2}
    assert values[1].startswith("not JSON: Expecting property name")
    assert values[2] == "not UTF-8: byte 0xff at position 7"
    assert values[3] == "not a JSON object: list"
    assert values[4] == "not a JSON object: str"
    assert values[5].startswith("not JSON: ")


def test_json_array(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('\n [{"a": 1},\n 7]')
    assert read(tmp_path / "x.json") == [("x.json:row 1", {"a": 1}), ("x.json:row 2", "not a JSON object: int")]
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b'[{"a": 1}]'))
    assert read(tmp_path / "x.json.gz") == [("x.json.gz:row 1", {"a": 1})]
    (tmp_path / "x.json").write_text('[{"a": 1},')
    with pytest.raises(UserError, match=r"x\.json: not a JSON array"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_json_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Numbers, strings and characters of several bytes may be cut anywhere."""
    monkeypatch.setattr(sources, "_PIECE", piece)
    rows = [{"a": -12.5e3, "b": 'é"\\,]['}, {}, {"c": [1, [2, {"d": None}]], "e": "]" * 50}, {"f": 12345.678}]
    for indent in (None, 2):
        (tmp_path / "x.json").write_bytes(
            b"\xef\xbb\xbf " + json.dumps(rows, ensure_ascii=False, indent=indent).encode() + b"\n"
        )
        assert [value for _, value in read(tmp_path / "x.json")] == rows
    (tmp_path / "x.json").write_text(" [ ] ")
    assert read(tmp_path / "x.json") == []


@pytest.mark.parametrize("text", ["[1,]", "[,1]", "[1 2]", "[1]]", "[1] x", "[1,2", "[[1]", "[1.2.3]", "[{]"])
def test_a_broken_array_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: not a JSON array: after row \d: "):
        read(tmp_path / "x.json")


def test_csv(tmp_path: Path) -> None:
    long = b"x" * 200_000  # more than the csv module takes by itself
    content = b'\xef\xbb\xbfa,b\n1,"two\nlines"\n\n3\n\xff,4\n"' + long + b'","q""q"\n1,2,3\n'
    (tmp_path / "x.csv").write_bytes(content)
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(content))
    expected: list[tuple[int, Any]] = [
        (2, {"a": "1", "b": "two\nlines"}),
        (5, "wrong number of fields: 1, the header has 2"),
        (6, "not UTF-8"),
        (7, {"a": long.decode(), "b": 'q"q'}),
        (8, "wrong number of fields: 3, the header has 2"),
    ]
    assert read(tmp_path / "x.csv") == [(f"x.csv:{line}", value) for line, value in expected]
    assert read(tmp_path / "x.csv.gz") == [(f"x.csv.gz:{line}", value) for line, value in expected]
    (tmp_path / "x.tsv").write_bytes(b"a\tb\r\n1,5\t\xc3\xa4\r\n")
    assert read(tmp_path / "x.tsv") == [("x.tsv:2", {"a": "1,5", "b": "ä"})]
    (tmp_path / "r.csv").write_bytes(b"a,b\n1,x\ry\n5,6\n")  # a carriage return within an unquoted field
    rows = read(tmp_path / "r.csv")
    assert (
        rows[0][0] == "r.csv:2" and rows[0][1].startswith("not CSV: ") and rows[1] == ("r.csv:3", {"a": "5", "b": "6"})
    )


def test_text_file_is_one_document_or_several(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n\ndocument <|endoftext|>\n")
    assert read(tmp_path / "x.txt") == [("x.txt:1", {"text": "one\n\ndocument <|endoftext|>\n"})]
    (tmp_path / "x.txt").write_bytes(b"a\nb\n<|endoftext|>\n\xff\n <|endoftext|> \nc\n<|endoftext|>\n\n")
    assert read(tmp_path / "x.txt") == [
        ("x.txt:1", {"text": "a\nb\n"}),
        ("x.txt:4", "not UTF-8: byte 0xff at position 0"),
        ("x.txt:6", {"text": "c\n"}),
    ]


def test_empty_text_file_is_an_empty_document_so_that_it_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"")
    assert read(tmp_path / "x.txt") == [("x.txt:1", {"text": ""})]


def test_parquet(tmp_path: Path) -> None:
    rows = [{"n": i, "messages": [{"role": "user", "content": str(i)}]} for i in range(1500)]  # more than a batch
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [(f"x.parquet:row {i + 1}", rows[i]) for i in range(1500)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"bad\.parquet: not a readable Parquet file"):
        read(tmp_path / "bad.parquet")


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"from": name}))


def test_folder_glob_and_list(tmp_path: Path) -> None:
    _write(tmp_path, "b.jsonl", "a/2.jsonl", "a/1.json", ".hidden/x.jsonl", "_tmp.jsonl", "readme.md")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"from": "c.jsonl.gz"}'))

    def names(path: Path | str | list[str]) -> list[str]:
        return [value["from"] for _, value in read(path)]

    assert names(tmp_path) == ["a/1.json", "a/2.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert names(str(tmp_path / "**/*.jsonl")) == ["_tmp.jsonl", "a/2.jsonl", "b.jsonl"]
    assert names([str(tmp_path / "b.jsonl"), str(tmp_path / "a")]) == ["b.jsonl", "a/1.json", "a/2.jsonl"]
    with pytest.raises(UserError, match="no file matches"):
        names(str(tmp_path / "*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data files in it"):
        names(tmp_path / "empty")


def test_folder_with_splits_gives_the_named_split_only(tmp_path: Path) -> None:
    _write(tmp_path, "data/train-00.jsonl", "data/train-01.jsonl", "data/test-00.jsonl")
    assert [value["from"] for _, value in read(tmp_path)] == ["data/train-00.jsonl", "data/train-01.jsonl"]
    assert [value["from"] for _, value in read(tmp_path, "test")] == ["data/test-00.jsonl"]
    with pytest.raises(UserError, match="none is named for it"):
        read(tmp_path, "validation")
    _write(tmp_path, "constraints.jsonl")  # holds "train" within a word
    with pytest.raises(UserError, match=r"constraints\.jsonl is named for none, others are"):
        read(tmp_path)


def test_splits_by_other_names(tmp_path: Path) -> None:
    _write(tmp_path, "training.jsonl", "testing.jsonl", "my_val.jsonl")
    assert [value["from"] for _, value in read(tmp_path)] == ["training.jsonl"]
    assert [value["from"] for _, value in read(tmp_path, "validation")] == ["my_val.jsonl"]
    assert read(tmp_path, "val") == read(tmp_path, "validation")
    _write(tmp_path, "train-test.jsonl")
    with pytest.raises(UserError, match=r"train-test\.jsonl is named for several"):
        read(tmp_path)


def test_missing_file_names_near_ones(tmp_path: Path) -> None:
    _write(tmp_path, "demonstrations.jsonl")
    with pytest.raises(UserError, match=r"demonstration\.jsonl: no such file; in .* there is demonstrations\.jsonl"):
        read(tmp_path / "demonstration.jsonl")
    with pytest.raises(UserError, match=r"and no folder .*/nowhere either"):
        read(tmp_path / "nowhere" / "x.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read("data/train.jsonl")  # like a hub id, but for its suffix
    _write(tmp_path, "x.pkl")
    with pytest.raises(UserError, match="not a kind of file that is read"):
        read(tmp_path / "x.pkl")


def test_damaged_gzip_is_an_error_not_a_shorter_file(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps({"n": n, "square": n * n}).encode() + b"\n" for n in range(5000)))
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz: the gzip file is damaged"):
        read(tmp_path / "x.jsonl.gz")


class _HubDataset(list[dict[str, Any]]):
    _fingerprint = "f00d"


def test_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, split: str) -> _HubDataset:
        if name == "owner/missing":
            raise FileNotFoundError("not on the hub")
        return _HubDataset([{"name": name, "split": split}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert next(read_rows("owner/found-1.0", split="test")).origin == "owner/found-1.0:row 1"
    assert read("owner/found-1.0", "test")[0][1] == {"name": "owner/found-1.0", "split": "test"}
    assert fingerprint("owner/found-1.0", "test") == fingerprint("owner/found-1.0", "test")
    with pytest.raises(UserError, match=r"owner/missing: no local file, and as a hub id .* not on the hub"):
        read("owner/missing")


def test_fingerprint_follows_content_and_order_not_names_and_dates(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": "{}", "b.jsonl": '{"x": 1}', "copy.jsonl": "{}"}.items():
        (tmp_path / name).write_text(content)
    a, b, copy = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "copy.jsonl"))
    assert fingerprint(a) == fingerprint(copy) != fingerprint(b)
    assert fingerprint([a, b]) != fingerprint([b, a])
    assert fingerprint([a, b]) != fingerprint([a])
