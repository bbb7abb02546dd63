"""How fast rows become packed-tree files, and in how much memory. Prints the tables of docs/benchmarks.md.

Real files: IMDb reviews as text, HH harmless and UltraFeedback as rankings, with a byte-level BPE tokenizer of 8,192
tokens trained on the reviews. Every measurement is a process of its own that builds one cache file and nothing else:
wall-clock time of reading, rendering, tokenising and writing, without imports. Memory is the peak of anonymous pages
(what the process has asked for, without the pages of mapped files), of it and its workers together.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# Name, kind, and how often its rows are repeated for speed: sources of a few thousand rows stay in one process.
FILES = {
    "IMDb reviews": ("imdb_train.jsonl.gz", "text", 1),
    "HH harmless": ("hh_harmless.jsonl.gz", "ranking", 10),
    "UltraFeedback": ("ultrafeedback_train.jsonl.gz", "ranking", 10),
}
SOURCE_OF_MEMORY = "IMDb reviews"
VOCAB_SIZE = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("RLHF_TEST_DATA")
    parser.add_argument("--data", type=Path, default=default, required=default is None, help="folder with the files")
    parser.add_argument("--tokenizer", help="a folder or hub id; else one is trained on the reviews")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--times", type=int, default=10, help="how often the data are repeated for the memory figure")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(**json.loads(arguments.measure))))
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = arguments.tokenizer or own_tokenizer(Path(arguments.data), Path(folder))
        print_speed(arguments, tokenizer, Path(folder))
        if not arguments.skip_memory:
            print_memory(arguments, tokenizer, Path(folder))


def print_speed(arguments: argparse.Namespace, tokenizer: str, folder: Path) -> None:
    print("| rows | kind | processes | rows/s | min-max | tokens/s | seconds |\n|---|---|---|---|---|---|---|")
    for title, (name, kind, times) in FILES.items():
        path = repeated(arguments.data / name, times, folder)
        taken: dict[int, list[dict[str, Any]]] = {workers: [] for workers in arguments.workers}
        for _ in range(arguments.rounds):  # taking turns, so that a busy moment hits both
            for workers, found in taken.items():
                found.append(apart(path=str(path), kind=kind, workers=workers, tokenizer=tokenizer))
        for workers, found in taken.items():
            speeds = sorted(one["rows"] / one["seconds"] for one in found)
            seconds = statistics.median(one["seconds"] for one in found)
            tokens = statistics.median(one["tokens"] / one["seconds"] for one in found)
            print(
                f"| {title} ({found[0]['rows']:,}) | {kind} | {workers} | {statistics.median(speeds):,.0f} | "
                f"{speeds[0]:,.0f}-{speeds[-1]:,.0f} | {tokens:,.0f} | {seconds:.2f} |",
                flush=True,
            )


def print_memory(arguments: argparse.Namespace, tokenizer: str, folder: Path) -> None:
    name, kind, _ = FILES[SOURCE_OF_MEMORY]
    print("\n| rows | processes | peak MB | of which before the first row |\n|---|---|---|---|")
    for times in (1, arguments.times):
        path = repeated(arguments.data / name, times, folder)
        for workers in arguments.workers:
            found = apart(path=str(path), kind=kind, workers=workers, tokenizer=tokenizer, watched=True)
            print(f"| {found['rows']:,} | {workers} | {found['peak']:,.0f} | {found['before']:,.0f} |", flush=True)


def repeated(file: Path, times: int, folder: Path) -> Path:
    """The same rows `times` over, in a new file."""
    path = folder / f"{times}-{file.name}"
    if not path.exists():
        with gzip.open(file) as source:
            content = source.read()
        with gzip.open(path, "wb", compresslevel=1) as sink:
            for _ in range(times):
                sink.write(content)
    return path


def apart(**what: Any) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--data", ".", "--measure", json.dumps(what)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(*, path: str, kind: Any, workers: int, tokenizer: str, watched: bool = False) -> dict[str, Any]:
    """Build one cache file. To watch memory takes time of its own: where speed is measured nobody does."""
    from transformers import AutoTokenizer

    from rlhf_pipeline.data.dataset import Source, build
    from rlhf_pipeline.data.encode import Lengths
    from rlhf_pipeline.data.prompts import Renderer

    gc.disable()  # as the command does until training begins
    renderer = Renderer(AutoTokenizer.from_pretrained(tokenizer))
    lengths = Lengths(max_length=512, max_prompt_length=384, long_prompt="keep_end", long_response="cut")
    before, peak, ended = memory(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, memory())

    watcher = threading.Thread(target=watch)
    cache = Path(tempfile.mkdtemp())
    if watched:
        watcher.start()
    start = time.perf_counter()
    try:
        source = Source(path=path, kind=kind, on_bad_row="skip")
        data = build(source, renderer, lengths, cache_dir=cache, workers=workers)
        seconds = time.perf_counter() - start
    finally:
        ended.set()
        if watched:
            watcher.join()
        shutil.rmtree(cache)
    counts = data.counts
    return {"rows": counts.rows, "tokens": counts.tokens, "seconds": seconds, "peak": peak, "before": before}


def memory() -> float:
    """Anonymous megabytes of this process and its children; what a fork shares counts once."""
    pid = os.getpid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(_private(one) for one in [str(pid), *children]) / 1024


def _private(pid: str) -> int:
    """Kilobytes of anonymous memory, shared ones in proportion."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def own_tokenizer(data: Path, folder: Path) -> str:
    from rlhf_pipeline.config.schema import TokenizerConfig
    from rlhf_pipeline.data.tokenizer import train_tokenizer, with_template

    with gzip.open(data / "imdb_train.jsonl.gz", "rt") as file:
        tokenizer = train_tokenizer((json.loads(line)["text"] for line in file), vocab_size=VOCAB_SIZE, context=512)
    path = folder / "tokenizer"
    with_template(tokenizer, TokenizerConfig(template="dialogue")).save_pretrained(path)
    return str(path)


if __name__ == "__main__":
    main()
