"""Folders of runs for the tests of the report: small files with the fields that stages and evaluations write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_stage(
    folder: Path,
    stage: str,
    *,
    digest: str | None = None,
    parents: dict[str, tuple[str, str | None]] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """A run of `stage` in `folder`; without a digest it has not ended. `parents`: role -> (path, content hash)."""
    write(folder / "run.json", {"stage": stage, "identity": {}})
    write_lines(folder / "metrics.jsonl", metrics or [{"step": i, "train/loss": 1.0 / i} for i in (1, 2, 3)])
    if digest is None:
        return
    manifest = {
        "kind": "reward_model" if stage == "rm" else "policy",
        "stage": stage,
        "step": 3,
        "config": config or {"name": "tiny", "seed": 0},
        "data": {"rows": {"fingerprint": "f" * 8, "counts": {"kept": 1200, "bad": {}}}},
        "metrics": {"eval/loss": 0.5},
        "parents": {
            role: {"path": path, "content_hash": theirs, "template_hash": None, "tokenizer_hash": None}
            for role, (path, theirs) in (parents or {}).items()
        },
        "versions": {"torch": "2.13.0"},
        "git_revision": "abcdef0123456789",
        "content_hash": digest,
    }
    write(folder / "artifact" / "artifact.json", manifest)
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [30, 40], "data_offsets": [0, 0]}}).encode()
    (folder / "artifact" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def interval(mean: float, reach: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "count": 4, "prompts": 4}


def prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def verdict_row(index: int, text: str, category: str, answers: dict[str, str], value: float | None) -> dict[str, Any]:
    """A line of verdicts.jsonl of two systems, the first held against the second."""
    a, b = answers
    outcome = {1.0: "a", 0.0: "b", 0.5: "tie", None: "malformed"}[value]
    return {
        "index": index,
        "prompt": prompt(text),
        "category": category,
        "answers": {
            name: {"response": said, "finish_reason": "stop", "response_tokens": len(said.split())}
            for name, said in answers.items()
        },
        "rulings": [
            {
                "system": a,
                "baseline": b,
                "value": value,
                "agreed": True,
                "verdicts": [
                    {"outcome": outcome, "reason": "because"},
                    {"outcome": {"a": "b", "b": "a"}.get(outcome, outcome), "reason": "turned"},
                ],
            }
        ],
    }


def write_winrate(run: Path, rows: list[dict[str, Any]], *, judge: str = "gold") -> None:
    """Results of `rlhf evaluate kind=winrate` of ppo against sft; the rate is made up, the rows are given."""
    folder = run / "winrate" / judge
    write_lines(folder / "verdicts.jsonl", rows)
    system = {"answers": 4, "tokens": 6.5, "characters": 30.0, "finished": 1.0, "distinct_1": 0.25, "identical": None}
    results = {
        "kind": "winrate",
        "judge": {"name": judge, "kind": judge},
        "prompts": len(rows),
        "unmatched": {},
        "systems": {name: {"path": f"runs/x/{name}", **system} for name in ("ppo", "sft")},
        "comparisons": [
            {
                "system": "ppo",
                "baseline": "sft",
                "win_rate": interval(0.6),
                "wins": 2,
                "ties": 1,
                "losses": 1,
                "disagreed": 1,
                "malformed": 0,
                "length_controlled": {"mean": 0.58, "low": 0.5, "high": 0.66},
                "by_category": {"chat": interval(0.7)},
            }
        ],
        "ranking": None,
    }
    write(folder / "results.json", results)


def write_gold(run: Path, rows: list[tuple[str, str, dict[str, tuple[str, float]]]]) -> None:
    """Results of kind=gold: rows of (prompt, category, {system: (answer, score)})."""
    lines = [
        {
            "prompt": prompt(text),
            "category": category,
            "answers": {
                name: {
                    "response": said,
                    "finish_reason": "stop",
                    "score": score,
                    "criteria": [{"name": "correct", "points": score, "out_of": 1.0, "why": f"it is <{score}>"}],
                }
                for name, (said, score) in answers.items()
            },
        }
        for text, category, answers in rows
    ]
    systems = {
        name: {
            "score": interval(0.5 + i / 10),
            "by_category": {"chat": interval(0.4)},
            "by_criterion": {"correct": interval(0.3)},
        }
        for i, name in enumerate(rows[0][2])
    }
    results = {"kind": "gold", "systems": systems, "differences": {"ppo - sft": interval(0.1)}}
    write(run / "gold" / "results.json", results)
    write_lines(run / "gold" / "verdicts.jsonl", lines)


def write_recipe(folder: Path) -> Path:
    """A whole small recipe: four stages, a gold evaluation and win rates of the same answers, a frontier."""
    losses = [{"step": i, "train/loss": 3.0 / i, "train/lr": 1e-3, "time/elapsed": 6.0 * i} for i in range(1, 61)]
    write_stage(folder / "pretrain", "pretrain", digest="p" * 64, metrics=losses)
    write_stage(folder / "sft", "sft", digest="s" * 64, parents={"model": ("runs/x/pretrain/artifact", "p" * 64)})
    write_stage(folder / "rm", "rm", digest="r" * 64, parents={"model": ("runs/x/sft/artifact", "s" * 64)})
    bins = [{"low": 0.5, "high": 0.6, "count": 4, "expected": 0.55, "observed": interval(0.6)}]
    groups = {"accuracy_by_responses": {"4": interval(0.7)}, "accuracy_by_distance": {"1": interval(0.6)}}
    write(folder / "rm" / "evaluation.json", {"accuracy": interval(0.7), "ece": 0.1, "calibration": bins, **groups})
    ppo = {"rollout/score": 0.1, "rollout/kl": 0.2, "kl/beta": 0.05, "time/rollout_seconds": 2.0}
    parents = {
        "model": ("runs/x/sft/artifact", "s" * 64),
        "rewards.rm": ("runs/x/rm/artifact", "r" * 64),
        "reference": ("runs/x/sft/artifact", "s" * 64),
    }
    rows = [{"step": i, **{name: one * i for name, one in ppo.items()}} for i in (1, 2, 3)]
    config = {"hub": {"access_token": "hf_abcdefghijklmnopqrstuvwxyz"}}
    write_stage(folder / "ppo", "ppo", digest="o" * 64, parents=parents, metrics=rows, config=config)
    run = folder / "evaluate"
    said = [
        ("Say hello.", "chat", "Hello!", EVIL, 0.2, 1.0, 1.0),
        ("Say bye.", "chat", "Bye.", "Goodbye.", 0.9, 0.3, 0.0),
        ("Sum up.", "summarising", "Short.", "Short.", 0.5, 0.5, 0.5),
    ]
    write_gold(run, [(p, c, {"sft": (a, x), "ppo": (b, y)}) for p, c, a, b, x, y, _ in said])
    rulings = [verdict_row(i, p, c, {"ppo": b, "sft": a}, v) for i, (p, c, a, b, *_, v) in enumerate(said)]
    write_winrate(run, rulings)
    for name, digest in {"sft": "s" * 64, "ppo": "o" * 64}.items():
        write(run / "answers" / name / "inputs.json", {"model": digest})
    points = [
        {"system": "ppo", "label": f"step_{i}", "method": "ppo", "step": i, "kl": 0.5 * i, "gold": 0.5 + 0.1 * i}
        for i in (1, 2)
    ]
    write(run / "frontier" / "results.json", {"kind": "frontier", "points": points})
    return folder
