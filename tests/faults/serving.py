"""What the server of the trials says: scores of episodes, or a judge's verdict. The same for the same question."""

from __future__ import annotations

import json
from typing import Any


def answer(body: bytes) -> bytes:
    asked: dict[str, Any] = json.loads(body)
    if "episodes" in asked:
        return json.dumps({"scores": [_points(one["response"]) for one in asked["episodes"]]}).encode()
    text = asked["messages"][-1]["content"]
    a, b = (text.partition(f"<response_{one}>")[2].partition(f"</response_{one}>")[0] for one in "ab")
    letter = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    message = {"role": "assistant", "content": f"The longer one.\n\nVerdict: {letter}"}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()


def _points(text: str) -> float:
    return len(text) / 8 - 0.7 * text.count("a")
