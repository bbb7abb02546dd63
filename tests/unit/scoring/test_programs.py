"""Programs that score: found where Python finds them, and their faults told by their own lines."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlhf_pipeline.data.lab.judge import judge
from rlhf_pipeline.data.lab.sets import rows
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.programs import open_program, score

EPISODES = [
    Episode(
        prompt=(Message("user", "2 + 2?"),),
        response=text,
        finished=True,
        columns={"answer": "4"},
        origin=f"sums.jsonl:{line}",
    )
    for line, text in enumerate(["4", "5", "it is 4"], start=1)
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, in which programs lie."""
    monkeypatch.chdir(tmp_path)
    before, known = list(sys.path), set(sys.modules)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # pytest may have put "" there
    yield tmp_path
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(path: str, text: str) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))


def scored(path: str) -> list[float]:
    return score(open_program(path), path, EPISODES).tolist()


def failure(path: str) -> str:
    with pytest.raises(UserError) as raised:
        scored(path)
    return str(raised.value)


def test_a_program_sees_the_episodes() -> None:
    write(
        "checks.py",
        """
        def correct(episodes):
            return [float(one.columns["answer"] in one.response and one.prompt[0].content == "2 + 2?" and one.finished)
                    for one in episodes]
        """,
    )
    assert scored("checks:correct") == [1.0, 0.0, 1.0]


def test_a_program_in_a_package_and_a_callable_object() -> None:
    write("mine/__init__.py", "")
    write(
        "mine/rewards.py",
        """
        class Length:
            def __call__(self, episodes):
                return [len(one.response) for one in episodes]
        length = Length()
        """,
    )
    assert scored("mine.rewards:length") == [1, 1, 7]


@pytest.mark.parametrize(
    "given",
    ["[1, 0.5, True]", "np.array([1, .5, 1], np.float32)", "torch.tensor([1, .5, 1])",
     "[np.int64(1), np.float16(.5), np.bool_(True)]", "(x for x in (1, .5, 1))"],
)  # fmt: skip
def test_numbers_of_any_kind(given: str) -> None:
    write("numbers_of.py", f"import numpy as np, torch\ndef f(episodes): return {given}\n")
    found = score(open_program("numbers_of:f"), "numbers_of:f", EPISODES)
    assert found.dtype == np.float64 and found.tolist() == [1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("[1.0]", "1 scores for 3 episodes; return one for each"),
        ("[1.0] * 4", "4 scores for 3 episodes"),
        ("[1.0, None, 2.0]", "the score of sums.jsonl:2 is no number: None (NoneType)"),
        ("['1', 2, 3]", "the score of sums.jsonl:1 is no number: '1' (str)"),
        ("[1, 2, [3]]", "the score of sums.jsonl:3 is no number: [3] (list)"),
        ("{0: 1.0, 1: 1.0, 2: 1.0}", "it returned a dict; return a list of numbers"),
        ("None", "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_what_is_no_list_of_scores(given: str, told: str) -> None:
    write("wrong.py", f"def f(episodes): return {given}\n")
    message = failure("wrong:f")
    assert told in message and message.startswith("program=wrong:f: ")


def test_an_exception_is_told_with_the_programs_line(folder: Path) -> None:
    write(
        "faulty.py",
        """
        import json
        def inner(one):
            return json.loads(one.response + "}")
        def outer(episodes):
            return [inner(one) for one in episodes]
        def leaves(episodes):
            raise SystemExit(3)
        def lazy(episodes):
            yield 1 / 0
        """,
    )
    assert failure("faulty:outer") == (
        f"program=faulty:outer: JSONDecodeError: Extra data: line 1 column 2 (char 1) ({folder}/faulty.py:4)"
    )
    assert f"SystemExit: 3 ({folder}/faulty.py:8)" in failure("faulty:leaves")
    assert f"ZeroDivisionError: division by zero ({folder}/faulty.py:10)" in failure("faulty:lazy")


def test_what_is_not_there(folder: Path) -> None:
    assert f"there is no module absent; {folder} has none" in failure("absent:f")
    write("present.py", "import os\ndef good(episodes): ...\ndef _hidden(): ...\nweight = 3\n")
    assert f"there is no module presant; {folder} has present. Run from the folder" in failure("presant:good")
    assert "there is no module present.deeper" in failure("present.deeper:f")
    assert f"no such function in {folder}/present.py; it has good" in failure("present:god")
    assert f"is no function in {folder}/present.py; it has good" in failure("present:weight")
    for path in ("present", "present:", ":good", "present.py:good:x", "pre sent:good", "../present:good", "a..b:c"):
        assert "write module:function" in failure(path), path


def test_what_importing_it_raises(folder: Path) -> None:
    write("needs.py", "\nimport no_such_library_x\n")
    told = f"ModuleNotFoundError: No module named 'no_such_library_x' ({folder}/needs.py:2)"
    assert failure("needs:f") == f"program=needs:f: {told}"
    write("broken.py", "\n\ndef f(:\n")
    assert f"SyntaxError: invalid syntax ({folder}/broken.py:3)" in failure("broken:f")
    write("raises.py", "import sys\nsys.exit('no')\n")
    assert f"SystemExit: no ({folder}/raises.py:2)" in failure("raises:f")


def test_a_library_comes_before_a_file_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    write("colorsys.py", "def rgb_to_hls(episodes): return [0.0] * len(episodes)\n")
    assert "TypeError: rgb_to_hls() missing 2 required" in failure("colorsys:rgb_to_hls"), "the one that Python has"


def test_the_labs_judge_is_a_program() -> None:
    path = "rlhf_pipeline.data.lab.scorer:gold"
    few = list(rows("demonstrations", count=4))
    asked = [tuple(Message(m["role"], m["content"]) for m in row["messages"][:-1]) for row in few]
    texts = [few[0]["messages"][-1]["content"], few[1]["messages"][-1]["content"], "", "I do not know."]
    finished = [True, False, True, True]
    episodes = [
        Episode(prompt=prompt, response=text, finished=ended, columns={}, origin="lab")
        for prompt, text, ended in zip(asked, texts, finished, strict=True)
    ]
    found = score(open_program(path), path, episodes).tolist()
    assert found == [judge(p, t, finished=f).score for p, t, f in zip(asked, texts, finished, strict=True)]
    assert found[0] == 1.0 and found[1] == 0.9 and found[2] == 0.0, "right, right but cut off, silent"
    with pytest.raises(UserError, match=r"the lab's judge cannot judge the prompt '2 \+ 2\?'"):
        scored(path)
