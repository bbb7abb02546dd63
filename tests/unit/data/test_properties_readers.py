"""Any rows, written in any format in any legal way, are read back as they were; any bytes do no harm.

The files are written by the standard library and pyarrow, not by code of this project.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_pipeline.data import sources
from rlhf_pipeline.data.records import BadRow
from rlhf_pipeline.data.sources import SUFFIXES, fingerprint, read_rows
from rlhf_pipeline.errors import UserError

# The same examples in every run: a red test means that the code has changed, never that it had bad luck. No deadline,
# because machines are busy at times.
fixed = settings(max_examples=20, deadline=None, derandomize=True, database=None)

BOM = "\ufeff".encode()
SEPARATOR = "<|endoftext|>"

# What splits lines or ends strings in some languages, and what does not survive a careless decoding.
_ODD = ["\n", "\r", "\r\n", "\t", "\0", "\x0b", "\x0c", "\x1c", "\x1e", "\x7f", "\x85", "\u2028", "\u2029", '"', "'", ",",
        '""', ",\n", "\\", "\\n", "\\ud800", "e\u0301", "\u200b", "\u200d", "\u202e", "שלום", "🙂", "\U0010ffff", "\ufeff",
        "\ufffe", "NaN", "null", "=1+1", " ", SEPARATOR]  # fmt: skip
_part = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(_ODD)
text = st.lists(_part, max_size=6).map("".join) | st.builds(lambda part, n: part * n, _part, st.just(5_000))
name = text.map(lambda t: f"n{t}n".replace("\0", ""))  # a column's; nothing to strip, no byte order mark, no NUL
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
line_ends = st.sampled_from([b"\n", b"\r\n"])
boms = st.sampled_from([b"", BOM])
blanks = st.lists(st.sampled_from([b"", b" ", b"\t "]), max_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples, which write their files anew."""
    return tmp_path_factory.mktemp("readers")


def put(file: Path, content: bytes) -> Path:
    file.write_bytes(gzip.compress(content, 1) if file.suffix == ".gz" else content)
    return file


def read(file: Path) -> list[tuple[int, Any]]:
    """(line or number of the row, value or the reason why there is none)."""
    found = []
    for row in read_rows(str(file)):
        place = row.origin.removeprefix(f"{file}:")
        assert place != row.origin
        found.append((int(place.removeprefix("row ")), row.value))
    return found


def good(found: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return [(place, value) for place, value in found if not isinstance(value, BadRow)]


def bad(found: list[tuple[int, Any]]) -> list[tuple[int, str]]:
    return [(place, value.reason) for place, value in found if isinstance(value, BadRow)]


BAD_LINES = {b'{"a": "\xff"}': "not UTF-8", b"\xed\xa0\x80": "not UTF-8", b'{"a": 1,}': "not JSON", b'{"a"': "not JSON",
             b"[1]": "not a JSON object", b"7": "not a JSON object", b"\0": "not JSON"}  # fmt: skip
bad_lines = st.sampled_from(sorted(BAD_LINES.items()))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
@fixed
@given(
    items=st.lists(st.tuples(blanks, st.dictionaries(text, _values, max_size=4) | bad_lines), max_size=6),
    ascii_only=st.booleans(),
    line_end=line_ends,
    last_end=st.booleans(),
    bom=boms,
)
def test_json_lines(
    folder: Path, suffix: str, items: list[Any], ascii_only: bool, line_end: bytes, last_end: bool, bom: bytes
) -> None:
    if suffix == ".json" and items and isinstance(items[0][1], tuple) and items[0][1][0].startswith(b"["):
        items = items[1:]  # a .json file that begins with "[" is an array
    lines, expected, expected_bad = [], [], []
    for before, item in items:
        lines += before
        if isinstance(item, dict):
            expected.append((len(lines) + 1, item))
            lines.append(json.dumps(item, ensure_ascii=ascii_only).encode())
        else:
            expected_bad.append((len(lines) + 1, item[1]))
            lines.append(item[0])
    file = put(folder / f"x{suffix}", bom + line_end.join(lines) + (line_end if last_end else b""))
    found = read(file)
    assert [place for place, _ in found] == sorted(place for place, _ in found)
    assert good(found) == expected
    assert bad(found) == expected_bad


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@fixed
@given(data=st.data(), ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2]), bom=boms, before=blanks)
def test_json_array(
    folder: Path,
    suffix: str,
    data: st.DataObject,
    ascii_only: bool,
    indent: int | None,
    bom: bytes,
    before: list[bytes],
) -> None:
    """Read in pieces, which end anywhere: within a number, a character, an escape."""
    rows = data.draw(st.lists(st.dictionaries(text, _values, max_size=4), max_size=5))
    content = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode()
    file = put(folder / f"array{suffix}", bom + b"\n".join([*before, content]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_PIECE", data.draw(st.sampled_from([1, 7, 2**20])))
        assert read(file) == list(enumerate(rows, start=1))


def _csv_line(cells: Sequence[str], delimiter: str, line_end: str, quoting: int) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=quoting).writerow(cells)
    return file.getvalue().encode()


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
@fixed
@given(data=st.data(), bom=boms, last_end=st.booleans())
def test_tables(folder: Path, suffix: str, delimiter: str, data: st.DataObject, bom: bytes, last_end: bool) -> None:
    # Quoted in full where a lone line break of the other kind would not be quoted by itself.
    line_end, quoting = data.draw(st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\n", csv.QUOTE_ALL)]))
    header = data.draw(st.lists(name, min_size=1, max_size=4, unique=True))
    damaged = {
        b'"\xff"' + delimiter.encode() * (len(header) - 1): "not UTF-8",
        delimiter.encode() * len(header): "wrong number of fields",
    }
    row = st.lists(text, min_size=len(header), max_size=len(header))
    items = data.draw(st.lists(row | st.sampled_from(sorted(damaged)) | st.just(b""), max_size=6))
    content = _csv_line(header, delimiter, line_end, quoting)
    expected, expected_bad = [], []
    for item in items:
        line = content.count(b"\n") + 1
        if isinstance(item, list):
            expected.append((line, dict(zip(header, item, strict=True))))
            content += _csv_line(item, delimiter, line_end, quoting)
        else:
            expected_bad += [(line, damaged[item])] if item else []
            content += item + line_end.encode()
    content = content if last_end else content.removesuffix(line_end.encode())
    found = read(put(folder / f"x{suffix}", bom + content))
    assert good(found) == expected
    assert bad(found) == expected_bad


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
@fixed
@given(
    documents=st.lists(text | st.just(b"\xff\n"), min_size=1, max_size=4),
    line_end=line_ends,
    last_separator=st.booleans(),
    bom=boms,
)
@example(documents=["a"], line_end=b"\n", last_separator=False, bom=b"")
def test_documents(
    folder: Path, suffix: str, documents: list[str | bytes], line_end: bytes, last_separator: bool, bom: bytes
) -> None:
    contents = [document if isinstance(document, bytes) else document.encode() for document in documents]
    contents = [  # a line of its own for the separator, and no line in a document that is one
        b"".join(line for line in (content + line_end).splitlines(keepends=True) if SEPARATOR.encode() not in line)
        for content in contents
    ]
    contents[0] = contents[0].removeprefix(BOM) if not bom else contents[0]
    line, whole, expected = 1, b"", []
    for content in contents:
        content = content if content.endswith(b"\n") or not content else content + b"\n"
        expected.append((line, content))
        whole += content + SEPARATOR.encode() + line_end
        line += content.count(b"\n") + 1
    if not last_separator:
        whole = whole.removesuffix(SEPARATOR.encode() + line_end)
        if len(expected) > 1 and not expected[-1][1].strip():  # nothing is no document, but for an empty file
            expected.pop()
    found = read(put(folder / f"x{suffix}", bom + whole))
    assert good(found) == [(line, {"text": content.decode()}) for line, content in expected if b"\xff" not in content]
    assert bad(found) == [(line, "not UTF-8") for line, content in expected if b"\xff" in content]


_record = st.fixed_dictionaries(
    {
        "text": st.none() | text,
        "n": st.none() | st.integers(-(2**63), 2**63 - 1),
        "messages": st.lists(st.fixed_dictionaries({"role": text, "content": st.none() | text}), max_size=3),
        "ranks": st.none() | st.lists(st.floats(allow_nan=False), max_size=3),
    }
)
_SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "n": pa.int64(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ranks": pa.list_(pa.float64()),
    }
)


@fixed
@given(records=st.lists(_record, max_size=6), group=st.integers(1, 4), compression=st.sampled_from(["none", "snappy"]))
def test_parquet(folder: Path, records: list[dict[str, Any]], group: int, compression: str) -> None:
    file = folder / "x.parquet"
    table = pa.Table.from_pylist(records, schema=_SCHEMA)
    pq.write_table(table, file, row_group_size=group, compression=compression)
    assert read(file) == list(enumerate(records, start=1))


@fixed
@given(parts=st.lists(st.lists(st.integers(), min_size=1, max_size=3), min_size=1, max_size=5), order=st.randoms())
def test_folders_globs_and_lists_keep_the_order(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], order: Any
) -> None:
    """A folder and a glob are read in the order of names, a list in its own; equal content has one fingerprint."""
    folder = tmp_path_factory.mktemp("files")
    names = [f"{'abc'[i % 3]}/part{i}.jsonl{'.gz' if i % 2 else ''}" for i in range(len(parts))]
    content = dict(zip(names, parts, strict=True))
    for file, numbers in content.items():
        (folder / file).parent.mkdir(exist_ok=True)
        put(folder / file, b"".join(b'{"n": %d}\n' % number for number in numbers))
    by_name = sorted(names)

    def numbers(path: str | list[str]) -> list[int]:
        return [row.value["n"] for row in read_rows(path) if isinstance(row.value, dict)]

    expected = [number for file in by_name for number in content[file]]
    assert numbers(str(folder)) == numbers(str(folder / "**" / "*.jsonl*")) == expected
    assert fingerprint(str(folder)) == fingerprint([str(folder / file) for file in by_name])
    order.shuffle(names)
    paths = [str(folder / file) for file in names]
    assert numbers(paths) == [number for file in names for number in content[file]]
    origins = [row.origin for row in read_rows(paths)]
    assert origins == [f"{folder / file}:{line}" for file in names for line in range(1, len(content[file]) + 1)]


# Any bytes at all


def _parquet_bytes() -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist(
        [{"text": f"a{i}", "n": i, "messages": [], "ranks": [0.5]} for i in range(20)], _SCHEMA
    )
    pq.write_table(table, file)
    return file.getvalue()


_PIECES = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\r", b"\n", b"\t", b"\0", b"\xff", b"\xed\xa0\x80", BOM,
           b"PAR1", b"\x1f\x8b\x08", b"a", b"1", b"NaN", SEPARATOR.encode()]  # fmt: skip
_bytes = st.binary(max_size=60) | st.lists(st.sampled_from(_PIECES), max_size=20).map(b"".join)
WHOLE = {
    ".jsonl": b'{"a": "\xc3\xa4", "b": [1, {"c": null}]}\n{"a": "x"}\n',
    ".json": b'[{"a": "\xc3\xa4"}, {"a": [1.5, true]}]',
    ".csv": b'a,b\r\n"x ""y""\nz",2\r\n3,4\r\n',
    ".tsv": b"a\tb\n1\t2\n",
    ".txt": f"one\n{SEPARATOR}\ntwo\n".encode(),
    ".parquet": _parquet_bytes(),
}
FORMS = [*SUFFIXES, *(suffix + ".gz" for suffix in SUFFIXES if suffix != ".parquet")]


def check_harmless(file: Path) -> None:
    """Rows with their places, or an error for people that names the file."""
    try:
        found = read(file)
    except UserError as error:
        assert str(error).startswith(f"{file}: ")
        return
    for place, value in found:
        assert place >= 1 and isinstance(value, dict | BadRow)
    assert [place for place, _ in found] == sorted({place for place, _ in found})


@pytest.mark.parametrize("suffix", FORMS)
@fixed
@given(content=_bytes, compressed=st.booleans())
def test_any_bytes_give_rows_or_a_users_error(folder: Path, suffix: str, content: bytes, compressed: bool) -> None:
    file = folder / f"any{suffix}"
    file.write_bytes(gzip.compress(content) if compressed and suffix.endswith(".gz") else content)
    check_harmless(file)


@pytest.mark.parametrize("suffix", FORMS)
@fixed
@given(data=st.data(), new=_bytes)
def test_a_damaged_file_gives_rows_or_a_users_error(folder: Path, suffix: str, data: st.DataObject, new: bytes) -> None:
    whole = WHOLE[suffix.removesuffix(".gz")]
    whole = gzip.compress(whole) if suffix.endswith(".gz") else whole
    at = data.draw(st.integers(0, len(whole)))
    gone = data.draw(st.sampled_from([0, 1, len(new), len(whole)]))
    file = folder / f"damaged{suffix}"
    file.write_bytes(whole[:at] + new + whole[at + gone :])
    check_harmless(file)
