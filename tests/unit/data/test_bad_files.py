"""Files as people really have them: damaged, misnamed, in another encoding, not files at all.

Each goes the public way, `dataset.build`. What cannot be used is a UserError that says what it is, where, and what to
do; never a traceback, never a wait without end, never rows that are silently others than those in the file.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pipeline.data.dataset import Source, build
from rlhf_pipeline.data.encode import Lengths
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.sources import read_rows
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.errors import UserError

LENGTHS = Lengths(max_length=64, max_prompt_length=48, long_prompt="drop", long_response="cut")
GOOD = b'{"prompt": "Sky?", "response": "Blue."}\n'
PARTS = [{"prompt": f"Sky {i}?", "response": "Blue."} for i in range(3000)]
KINDS = r"\.jsonl, \.json, \.parquet, \.csv, \.tsv, \.txt"
Build = Callable[..., TreeDataset]
Complaint = Callable[..., str]


@pytest.fixture
def make(renderer: Renderer, tmp_path: Path) -> Build:
    """make(path): demonstrations, from a file in the test's folder or from elsewhere."""

    def make(path: str | list[str], **changes: Any) -> TreeDataset:
        source = Source(path=path, **({"kind": "demonstration"} | changes))
        return build(source, renderer, LENGTHS, cache_dir=tmp_path.parent / f"{tmp_path.name}-cache")

    return make


@pytest.fixture
def complaint(make: Build, tmp_path: Path) -> Complaint:
    """complaint(name, content) writes the file, fails to build from it, and returns what the user is told."""

    def complaint(name: str, content: bytes | None = None, **changes: Any) -> str:
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            make(str(file), **changes)
        message = str(caught.value)
        message.encode()  # it can be printed
        assert len(message) < 3000
        return message.replace(str(tmp_path), "")

    return complaint


def _parquet(folder: Path, table: pa.Table) -> bytes:
    pq.write_table(table, folder / "table.tmp")
    return (folder / "table.tmp").read_bytes()


# What is not there, or no file


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gone.jsonl", r"^/gone\.jsonl: no such file"),
        ("nowhere/x.jsonl", r"^/nowhere/x\.jsonl: no such file, and no folder /nowhere either"),
        ("good.jsonl/x.jsonl", r"/x\.jsonl: no such file, and no folder /good\.jsonl either"),
        ("*.csv", r"^/\*\.csv: no file matches"),
        ("[.jsonl", r"^/\[\.jsonl: no file matches"),
        ("nul\0.jsonl", "no such file"),
        ("good.jsonI", r"in .* there is good\.jsonl"),
    ],
)
def test_path_that_leads_nowhere(complaint: Complaint, tmp_path: Path, name: str, pattern: str) -> None:
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    message = complaint(name)
    assert_matches(message, pattern)


def assert_matches(message: str, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        raise UserError(message)


@pytest.mark.parametrize("path", ["x" * 5000 + ".jsonl", "~no-such-user/x.jsonl"])
def test_path_that_cannot_be(make: Build, path: str) -> None:
    with pytest.raises(UserError):
        make(path)


@pytest.mark.parametrize(
    "name", ["x.xlsx", "x", "x.JSONL", "x.jsonl.zst", "x.tar.gz", ".gz", "x.parquet.gz", "x.jsonl~"]
)
def test_suffix_of_no_known_kind(complaint: Complaint, name: str) -> None:
    assert_matches(complaint(name, GOOD), rf"^/{name}: not a kind of file that is read; known are {KINDS}")


@pytest.mark.parametrize("name", ["empty", "folder.jsonl"])
def test_folder_without_data(complaint: Complaint, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "readme.md").write_text("nothing here")
    assert_matches(complaint(name), rf"^/{name}: no data files in it; known are {KINDS}")


def test_links_that_lead_in_circles_or_nowhere(complaint: Complaint, make: Build, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    (folder / "nowhere.jsonl").symlink_to("gone")
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    assert_matches(complaint("data"), "^/data: no data files in it")
    assert_matches(complaint("self.jsonl"), r"^/self\.jsonl: ")
    assert_matches(complaint("data/nowhere.jsonl"), r"^/data/nowhere\.jsonl: ")
    (folder / "good.jsonl").write_bytes(GOOD)
    assert len(make(str(folder))) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe.parquet", "pipe.csv.gz"])
def test_pipe_is_not_waited_for(complaint: Complaint, make: Build, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    os.mkfifo(folder / name)

    def give_up(*_: Any) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        assert_matches(complaint(f"data/{name}"), rf"^/data/{name}: not a (regular )?file")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (folder / "good.jsonl").write_bytes(GOOD)
    assert len(make(str(folder))) == 1  # a folder's are left out


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="this system has no /dev/null")
def test_device_is_not_read(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "null.jsonl").symlink_to("/dev/null")
    assert_matches(complaint("null.jsonl"), r"^/null\.jsonl: not a (regular )?file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.csv"])
def test_file_that_may_not_be_read(complaint: Complaint, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD)
    (tmp_path / name).chmod(0)
    assert_matches(complaint(name), rf"^/{name}: .*[Pp]ermission")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_read_error_is_the_users_to_see(
    monkeypatch: pytest.MonkeyPatch, complaint: Complaint, tmp_path: Path, name: str
) -> None:
    """Also for root: the system refuses, as it does on a broken disk or without permission."""
    (tmp_path / name).write_bytes(GOOD)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(gzip, "open", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    assert_matches(complaint(name), rf"^/{name}: .*Permission denied")


def test_file_that_vanishes_between_finding_and_reading(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    rows = read_rows(str(tmp_path))
    next(rows)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"b\.jsonl"):
        list(rows)


def test_file_whose_name_is_not_utf8(make: Build, tmp_path: Path) -> None:
    """Old archives have them. The name is part of each row's place."""
    file = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    try:
        file.write_bytes(GOOD)
    except OSError:
        pytest.skip("this file system has no such names")
    try:
        assert make(str(file)).origin(0).endswith(".jsonl:1")
    except UserError as error:
        str(error).encode()


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("train.jsonl", "more.jsonl"), r"split 'train': more\.jsonl is named for none, others are"),
        (("test.jsonl", "validation.jsonl"), "split 'train': none is named for it"),
    ],
)
def test_folder_whose_splits_are_unclear(
    complaint: Complaint, tmp_path: Path, names: tuple[str, ...], pattern: str
) -> None:
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).write_bytes(GOOD)
    assert_matches(complaint("data"), rf"^/data: .*{pattern}; name the files")


# Files that are damaged or of another kind than they are named for


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_empty_file(complaint: Complaint, name: str, content: bytes) -> None:
    content = gzip.compress(content) if name.endswith(".gz") and content else content
    assert_matches(complaint(name, content), rf"^/{name}: none of 0 rows is left \(it is empty\)")


def test_empty_text_and_parquet(complaint: Complaint, tmp_path: Path) -> None:
    assert_matches(complaint("x.txt", b"", kind="text"), r"(?s)1 of 1 rows of /x\.txt.*/x\.txt:1: the text is empty")
    assert_matches(complaint("x.parquet", b""), r"^/x\.parquet: not a readable Parquet file")
    no_rows = _parquet(tmp_path, pa.Table.from_pylist(PARTS[:1]).slice(1))
    assert_matches(complaint("y.parquet", no_rows), r"^/y\.parquet: none of 0 rows is left \(it is empty\)")


WHOLE = gzip.compress(b"".join(json.dumps(part).encode() + b"\n" for part in PARTS))


@pytest.mark.parametrize(
    "content", [GOOD, WHOLE[:5], WHOLE[:-9], WHOLE + b"more", WHOLE[:40] + bytes(9) + WHOLE[49:]],
    ids=["plain", "header", "cut", "longer", "overwritten"],
)  # fmt: skip
def test_gzip_that_is_none_or_damaged(complaint: Complaint, content: bytes) -> None:
    assert_matches(complaint("x.jsonl.gz", content), r"^/x\.jsonl\.gz: the gzip file is damaged .*; copy it again")


def test_parquet_that_is_none_or_damaged(complaint: Complaint, tmp_path: Path) -> None:
    whole = _parquet(tmp_path, pa.Table.from_pylist([{"text": f"{i} " * 50} for i in range(2000)]))
    for number, content in enumerate((GOOD * 5, whole[: len(whole) // 2], whole[:200] + b"\xff" * 500 + whole[700:])):
        message = complaint(f"{number}.parquet", content, kind="text")
        assert_matches(message, rf"^/{number}\.parquet: not a readable Parquet file after row \d+: ")


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")), "UTF-8|utf-8"),
        (pa.array([2**62], pa.timestamp("us")), "out of range|date"),
    ],
    ids=["not UTF-8", "year 148000"],
)
def test_parquet_value_that_python_has_not(complaint: Complaint, tmp_path: Path, column: pa.Array, reason: str) -> None:
    content = _parquet(tmp_path, pa.table({"text": column}))
    assert_matches(complaint("x.parquet", content, kind="text"), rf"/x\.parquet.*({reason})")


# Rows: the file and the line are named, and the others are not harmed


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        (b'{"prompt": "Sky?", "response": "Blue.",}', "not JSON: "),
        (b'{"prompt": "Sky?", "response": "Blue."},', "not JSON: Extra data"),
        (b'{"prompt": "Sky?" "response": "Blue."}', "not JSON: Expecting ',' delimiter"),
        (b"{'prompt': 'Sky?'}", "not JSON: "),
        (b'{"prompt": "caf\xe9", "response": "x"}', "not UTF-8: byte 0xe9 at position 15"),
        (b'{"prompt": "\xed\xa0\x80", "response": "x"}', "not UTF-8: "),
        (b'{"prompt": "\\ud800", "response": "x"}', "the user message is not valid Unicode: a lone surrogate"),
        (b'{"\\ud800": 1}', "no field 'prompt'"),
        (b'["Sky?", "Blue."]', "not a JSON object: list"),
        (b"null", "not a JSON object: NoneType"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON: .*recursion"),
        (b'{"prompt": ' + b"9" * 5000 + b', "response": "x"}', "not JSON: .*digits"),
        (b'{"prompt": NaN, "response": "x"}', "prompt is not a string: float"),
        (b'{"prompt": 1e999, "response": "x"}', "prompt is not a string: float"),
        (b"\0" * 100, "not JSON: "),
        (b'{"prompt": "", "response": "x"}', "the user message is empty"),
        (b'{"prompt": "\\u2003", "response": "x"}', "the user message is empty"),
        (b'{"prompt": "x", "response": null}', "response is not a string: NoneType"),
        (b'{"prompt": "x"}', "no field 'response': there is prompt"),
        (b"{}", "no field 'prompt'"),
        (b"{" + b",".join(b'"k%d": 1' % i for i in range(20_000)) + b"}", "no field 'prompt'"),
        (b'{"prompt": "\xf3\xb0\x80\x80", "response": "x"}', r"the text holds U\+F0000"),
    ],
    ids=range(22),
)  # fmt: skip
def test_bad_line(complaint: Complaint, make: Build, tmp_path: Path, line: bytes, pattern: str) -> None:
    message = complaint("x.jsonl", GOOD + line + b"\n" + GOOD)
    assert_matches(message, r"^1 of 3 rows of /x\.jsonl cannot be used:")
    assert_matches(message, rf"\n  /x\.jsonl:2: .*{pattern}")
    assert message.endswith("Correct them, or set data.on_bad_row=skip to go on without them")
    skipped = make(str(tmp_path / "x.jsonl"), on_bad_row="skip")
    assert len(skipped) == 2 and sum(skipped.counts.bad.values()) == 1


USER, ANSWER = {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}


@pytest.mark.parametrize(
    ("messages", "pattern"),
    [
        (None, "messages is not a list: NoneType"),
        ("Sky?", "messages is not a list: str"),
        ([], "no messages|the last message is not the assistant's"),
        ([1, 2], "a message is not an object: int"),
        ([[USER], [ANSWER]], "a message is not an object: list"),
        ([USER], "the last message is not the assistant's"),
        ([ANSWER], "the prompt has no user message"),
        ([{"role": "system", "content": "x"}, ANSWER], "the prompt has no user message"),
        ([USER, ANSWER | {"content": "\ud800"}], "the assistant message is not valid Unicode"),
        ([USER, ANSWER | {"content": " \n"}], "the assistant message is empty"),
        ([USER, {"role": "assistant"}], "no field 'content': there is role"),
        ([{"content": "x"}, ANSWER], "no field 'role': there is content"),
        ([USER | {"role": "clown"}, ANSWER], "unknown role: 'clown'"),
        ([USER | {"role": "\ud800"}, ANSWER], "unknown role"),
        ([USER | {"role": "x" * 100_000}, ANSWER], "unknown role"),
        ([USER | {"role": None}, ANSWER], "role is not a string: NoneType"),
        ([USER | {"content": 3}, ANSWER], "content is not a string: int"),
        ([USER, ANSWER | {"weight": 0.5}], "weight is neither 0 nor 1: 0.5"),
        ([USER, ANSWER | {"weight": float("nan")}], "weight is neither 0 nor 1: nan"),
        ([USER, ANSWER | {"weight": "1"}], "weight is neither 0 nor 1: '1'"),
        ([USER, ANSWER | {"weight": []}], r"weight is neither 0 nor 1: \[\]"),
    ],
    ids=range(21),
)
def test_bad_messages(complaint: Complaint, messages: Any, pattern: str) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"messages": messages}]
    message = complaint("x.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert_matches(message, rf"^1 of 2 rows of /x\.jsonl cannot be used:\n  /x\.jsonl:2: .*({pattern})")


@pytest.mark.parametrize(
    "row", [{}, {"question": 1}, {"\ud800": 1}, {f"k{i}": 1 for i in range(20_000)}],
    ids=["none", "other", "surrogate", "many"],
)  # fmt: skip
def test_fields_of_no_known_format(complaint: Complaint, row: dict[str, Any]) -> None:
    message = complaint("x.jsonl", json.dumps(row).encode())
    assert_matches(message, r"^/x\.jsonl:1: no format makes a demonstration of rows with")
    assert_matches(message, r"data\.columns|known are")


def test_very_long_line(complaint: Complaint, make: Build, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x" * 10_000_000, "response": "y"}).encode()
    assert_matches(complaint("x.jsonl", GOOD + line[:-2]), r"/x\.jsonl:2: not JSON: Unterminated string")
    (tmp_path / "y.jsonl").write_bytes(GOOD + line.replace(b"x" * 9_990_000, b" "))
    assert make(str(tmp_path / "y.jsonl")).counts.dropped_long_prompt == 1


@pytest.mark.parametrize("content", [b"7", b'"text"', b"true"])
def test_json_that_is_neither_array_nor_object(complaint: Complaint, content: bytes) -> None:
    assert_matches(complaint("x.json", content), r"/x\.json:1: not a JSON object: ")


@pytest.mark.parametrize(
    "content", [b"[1,", b"[1] [2]", b"[1,,2]", b"[1 2]", b"[,]", b"[1,]", b"[\xff]", b'["\xc3'],
)  # fmt: skip
def test_json_array_that_is_damaged(complaint: Complaint, content: bytes) -> None:
    assert_matches(complaint("x.json", content, on_bad_row="skip"), r"^/x\.json: not a JSON array: ")


# Other encodings: what is read is never another text than what is meant


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", GOOD.decode()),
        ("x.json", f"[{GOOD.decode()}]"),
        ("x.csv", "prompt,response\nSky?,Blue.\n"),
        ("x.tsv", "prompt\tresponse\nSky?\tBlue.\n"),
    ],
)
def test_other_unicode(complaint: Complaint, name: str, content: str, encoding: str) -> None:
    assert_matches(complaint(name, content.encode(encoding)), rf"/{name}.*(UTF-8|not JSON|not a JSON array)")


def test_latin_1(complaint: Complaint) -> None:
    table = "prompt,response\ncafé,x\n"
    assert_matches(complaint("x.csv", table.encode("latin-1")), r"/x\.csv:2: not UTF-8")
    assert_matches(complaint("x.json", '[{"prompt": "é"}]'.encode("latin-1")), r"/x\.json: .*0xe9")
    assert_matches(complaint("x.txt", "é".encode("latin-1"), kind="text"), r"/x\.txt:1: not UTF-8: byte 0xe9")
    header = "prompt,response,né\na,b,c\n"
    assert_matches(complaint("h.csv", header.encode("latin-1")), r"/h\.csv.*UTF-8")


# Tables


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"prompt,response\na\n", ":2: wrong number of fields: 1, the header has 2"),
        (b"prompt,response\na,b\nc,d,e\n", ":3: wrong number of fields: 3, the header has 2"),
        (b"Sky?,Blue.\nGrass?,Green.\n", "no format makes a demonstration of rows with .*Sky"),
        (b"prompt,response\n", "none of 0 rows is left"),
        (b"prompt,response,response\na,b,c\n", "'?response'?.*(twice|more than once)"),
        (b"prompt,,\na,b,c\n", "no format makes a demonstration of rows with the fields prompt .a string.. "),
        (b"prompt,x\ry\n1,2\n", "carriage return|new-line|not CSV"),
        (b"prompt,response\r1,2\r", "carriage return|new-line|not CSV"),
        (b'prompt,"response\na,b\n', "not CSV|quot"),
        (b'prompt,response\na,"b\nc,d\ne,f\n', ":2: not CSV: .*"),
    ],
    ids=["short", "long", "no header", "only header", "twice", "no name", "return", "returns", "open header", "open"],
)
def test_bad_table(complaint: Complaint, content: bytes, pattern: str) -> None:
    assert_matches(complaint("x.csv", content), rf"/x\.csv.*({pattern})")


def test_blank_lines_before_a_header_and_nul_bytes_within(make: Build, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\n\r\nprompt,response\na\0b,c\n")
    assert [row.value for row in read_rows(str(tmp_path / "x.csv"))] == [{"prompt": "a\0b", "response": "c"}]
    assert make(str(tmp_path / "x.csv")).origin(0).endswith("x.csv:4")


def test_parquet_with_a_column_twice(complaint: Complaint, tmp_path: Path) -> None:
    column = pa.array(["Sky?"])
    table = pa.Table.from_arrays([column, pa.array(["Blue."]), pa.array(["Red."])], ["prompt", "response", "response"])
    assert_matches(
        complaint("x.parquet", _parquet(tmp_path, table)), r"/x\.parquet: .*'?response'?.*(twice|more than once)"
    )
