"""Reads rows from local files, folders, globs and hub ids, and names the place of each one.

A row is a dict of fields or the reason why there is none: one bad line never ends the reading, the caller
decides. What the fields mean is `formats`' business. `datasets` is imported for hub ids only, pyarrow for
Parquet only.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from rlhf_pipeline.data.records import BadRow
from rlhf_pipeline.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENT_END = b"<|endoftext|>"  # alone on a line of a .txt file: ends a document
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
SPLITS = ("train", "validation", "valid", "dev", "eval", "test")
_ALSO = {"training": "train", "val": "validation", "evaluation": "eval", "testing": "test"}  # in names of files

_LOCAL_SPLIT = re.compile(rf"(?<![a-z])({'|'.join((*SPLITS, *_ALSO))})(?![a-z])")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_BLANK = re.compile(r"[ \t\n\r]*")
_PIECE = 2**20  # bytes of a JSON array that are read at a time
_NEXT = {"": "[", "[": "]", ",": "", "v": ",]", "]": ""}  # what may follow in an array, besides elements
_MAX_FIELD = 2**31 - 1  # characters of one CSV field; the csv module's own 131,072 is too few for documents


@dataclass(frozen=True, slots=True)
class Row:
    """`origin` is "file:line" (the row's first line) or, in a file without lines, "file:row N"; 1-based."""

    origin: str
    value: dict[str, Any] | BadRow


def read_rows(path: str | Sequence[str], *, split: str = "train") -> Iterator[Row]:
    """Every row of `path`, in a fixed order.

    `path` is a file, a folder (recursive, sorted), a glob, a hub id `owner/name`, or a list of these. `split`
    picks the split of a hub id and, in a folder where files are named for splits, the files named for it.
    Raises UserError for what does not exist or cannot be opened.
    """
    for source in _sources(path, split):
        if isinstance(source, Path):
            yield from _read_file(source)
        else:
            for number, value in enumerate(_hub(source, split), start=1):
                yield Row(f"{source}:row {number}", value)


def fingerprint(path: str | Sequence[str], split: str = "train") -> str:
    """Hash of the content and order of everything `read_rows` would read; names and dates do not enter it."""
    digest = hashlib.sha256()
    for source in _sources(path, split):
        if isinstance(source, Path):
            status = source.stat()
            digest.update(_digest(source.absolute(), status.st_size, status.st_mtime_ns))
        else:
            digest.update(f"{source} {_hub(source, split)._fingerprint}".encode())
    return digest.hexdigest()


def is_on_hub(path: str, split: str = "train") -> bool:
    """Whether `path` is a hub id. UserError if it is nothing that can be read."""
    return any(isinstance(source, str) for source in _sources(path, split))


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, changed: int) -> bytes:
    """Of a file's content; a file that has the size and the time of before is not read again by this process."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


# Finding files


def _sources(path: str | Sequence[str], split: str) -> list[Path | str]:
    """Local files as Path, hub ids as str."""
    if not isinstance(path, str):
        return [source for one in path for source in _sources(one, split)]
    try:
        local = Path(path).expanduser()
        if local.is_dir():
            return list(_folder(local, split))
        if local.exists():
            _suffix(local)
            if not local.is_file():
                raise UserError(f"{path}: not a file but a pipe or a device; copy what comes from it into a file")
            return [local]
    except (OSError, RuntimeError) as error:  # a name too long, no permission, no such user
        raise UserError(f"{path[:200]}: cannot be looked for: {error}") from error
    if glob.has_magic(path):
        found = sorted(Path(match) for match in glob.glob(str(local), recursive=True))
        files = [match for match in found if match.is_file() and _suffix(match)]
        if not files:
            raise UserError(f"{path}: no file matches")
        return list(files)
    is_data_file = local.name.removesuffix(".gz").endswith(SUFFIXES)
    if _HUB_ID.fullmatch(path) and not is_data_file and not local.parent.is_dir():
        return [path]
    raise UserError(_missing(local))


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, and no folder {path.parent} either"
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"{path}: no such file" + (f"; in {path.parent} there is {', '.join(near)}" if near else "")


def _suffix(path: Path) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix == ".gz"):
        raise UserError(
            f"{path}: not a kind of file that is read; known are {', '.join(SUFFIXES)}, all but .parquet also as .gz"
        )
    return suffix


def _folder(folder: Path, split: str) -> list[Path]:
    """A folder's data files; where files are named for splits, only those of `split`: never the test set."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.name.removesuffix(".gz").endswith(SUFFIXES)
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(f"{folder}: no data files in it; known are {', '.join(SUFFIXES)}, also as .gz")
    named = {
        file: {_ALSO.get(name, name) for name in _LOCAL_SPLIT.findall(str(file.relative_to(folder)).lower())}
        for file in files
    }
    if not any(named.values()):
        return files
    doubtful = [file for file in files if len(named[file]) != 1]
    files = [file for file in files if _ALSO.get(split, split) in named[file]]
    if doubtful or not files:
        how = "none, others are" if doubtful and not named[doubtful[0]] else "several"
        raise UserError(
            f"{folder}: cannot tell which files are its split {split!r}: "
            + (f"{doubtful[0].name} is named for {how}" if doubtful else "none is named for it")
            + "; name the files instead of the folder"
        )
    return files


@lru_cache(maxsize=8)
def _hub(name: str, split: str) -> Dataset:
    """A data set of the hub. The import is here because it takes longer than reading most local files."""
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # of every kind: network, permission, configuration name, split
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name}: no local file, and as a hub id it cannot be loaded: {reason}") from error


# Reading one file


def _read_file(path: Path) -> Iterator[Row]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            if suffix == ".txt":
                yield from _documents(path, file)
            elif suffix in (".csv", ".tsv"):
                yield from _table(path, file, "\t" if suffix == ".tsv" else ",")
            elif suffix == ".json" and _is_array(file):
                yield from _array(path, file)
            else:
                yield from _lines(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {data[error.start]:#04x} at position {error.start}") from None


def _parse(data: bytes) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(_decode(data))
    except BadRow as bad:
        return bad
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", str(error))
    return _object(value)


def _object(value: Any) -> dict[str, Any] | BadRow:
    return value if isinstance(value, dict) else BadRow("not a JSON object", type(value).__name__)


def _lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield Row(f"{path}:{number}", _parse(line))


def _is_array(file: BinaryIO) -> bool:
    start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _array(path: Path, file: BinaryIO) -> Iterator[Row]:
    number = 0
    try:
        for number, value in enumerate(_elements(file), start=1):
            yield Row(f"{path}:row {number}", _object(value))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: not a JSON array: after row {number}: {error}") from error


def _elements(file: BinaryIO) -> Iterator[Any]:
    """The elements of a JSON array, read piece by piece: parsed at once, they take ten times the file in memory.

    ValueError where it is no array.
    """
    parser, decoder = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text, at, size = "", 0, _PIECE
    before = ""  # what was read last: "" nothing, then one of [ , ] or v for a value
    piece = b"-"
    while piece:
        piece = file.read(size)
        text, at = text[at:] + decoder.decode(piece, final=not piece), 0
        while (at := _skip(text, at)) < len(text):
            if text[at] in _NEXT[before]:
                before, at = text[at], at + 1
                continue
            if before not in ("[", ","):
                raise ValueError(f"{text[at]!r} where {' or '.join(_NEXT[before]) or 'nothing'} should be")
            try:
                value, end = parser.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if not piece:
                    raise ValueError(error.msg) from None
                size *= 2  # an element longer than what has been read, or a mistake
                break
            if piece and text[(after := _skip(text, end)) : after + 1] not in (",", "]"):
                break  # a number may go on in the next piece
            yield value
            before, at = "v", end
    if before != "]":
        raise ValueError("the file ends within it")


def _skip(text: str, at: int) -> int:
    """The next place that is not blank."""
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _table(path: Path, file: BinaryIO, delimiter: str) -> Iterator[Row]:
    """CSV by a header line. Undecodable bytes travel as surrogates, so that only their own row is bad."""
    csv.field_size_limit(_MAX_FIELD)
    text = (
        (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line).decode(errors="surrogateescape")
        for number, line in enumerate(file)
    )
    reader = csv.reader(text, delimiter=delimiter, strict=True)  # strict: a quote that nothing closes is an error
    try:
        header = next((cells for cells in reader if any(cell.strip() for cell in cells)), None)
    except csv.Error as error:
        raise UserError(f"{path}: the header line is not CSV: {error}") from error
    if header is None:
        return
    _check_header(path, header)
    while True:
        origin = f"{path}:{reader.line_num + 1}"
        value: dict[str, Any] | BadRow
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(origin, BadRow("not CSV", str(error)))
            continue
        if len(cells) != len(header):
            if not cells:
                continue  # an empty line
            value = BadRow("wrong number of fields", f"{len(cells)}, the header has {len(header)}")
        elif any("\udc80" <= char <= "\udcff" for cell in cells if not cell.isascii() for char in cell):
            value = BadRow("not UTF-8")
        else:
            value = {name: cell for name, cell in zip(header, cells, strict=True) if name}  # pandas' index has none
        yield Row(origin, value)


def _check_header(path: Path, names: Sequence[str]) -> None:
    if any("\udc80" <= char <= "\udcff" or char == "\0" for name in names for char in name):
        raise UserError(f"{path}: the column names are not UTF-8; save the file as UTF-8")
    if twice := [name for number, name in enumerate(names) if name and name in names[:number]]:
        raise UserError(f"{path}: a column named {twice[0]!r} is there more than once; rename one or take it out")


def _documents(path: Path, file: BinaryIO) -> Iterator[Row]:
    """A .txt file is one document, or several that are ended by lines holding only `<|endoftext|>`."""
    start = 1
    lines: list[bytes] = []
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip() == DOCUMENT_END:
            yield from _document(path, start, lines)
            start, lines = number + 1, []
        else:
            lines.append(line)
    if start == 1 or b"".join(lines).strip():  # nothing after the last separator is no document
        yield from _document(path, start, lines)


def _document(path: Path, start: int, lines: list[bytes]) -> Iterator[Row]:
    try:
        yield Row(f"{path}:{start}", {"text": _decode(b"".join(lines))})
    except BadRow as bad:
        yield Row(f"{path}:{start}", bad)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_header(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:row {number}", value)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # text that is not UTF-8, years too large
        raise UserError(f"{path}: not a readable Parquet file after row {number}: {error}") from error
