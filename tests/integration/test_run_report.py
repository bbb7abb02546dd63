"""`rlhf report` as users meet it, and its page in a real browser where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_browser import CHROMIUM, Browser
from helpers_report import EVIL, write_recipe, write_stage
from helpers_runs import Forks

COUNT = "document.getElementById('count').textContent"
CARD = "document.querySelectorAll('.sample')"


def test_the_page_lies_in_the_folder_whatever_it_is_called(rlhf: Forks, tmp_path: Path) -> None:
    write_recipe(tmp_path / "runs" / "lr=0.1, beta 2")
    said = rlhf.run(tmp_path, "report", "runs/lr=0.1, beta 2").output
    page = tmp_path / "runs" / "lr=0.1, beta 2" / "report.html"
    shown, _, where = said.strip().rpartition("\n")
    assert where == "runs/lr=0.1, beta 2/report.html (4 training runs, 3 evaluations)"
    assert all(word in shown for word in ("model", "gold score", "beats sft", "minutes", "ppo"))
    assert "<title>lr=0.1, beta 2</title>" in page.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "runs"}  # of the test, and what it was given
    before = page.read_bytes()
    rlhf.run(tmp_path, "report", "runs/lr=0.1, beta 2")
    assert page.read_bytes() == before


def test_another_place_title_and_number_of_samples(rlhf: Forks, tmp_path: Path) -> None:
    write_recipe(tmp_path / "demo")
    rlhf.run(tmp_path, "report", "demo", "output=page.html", "title=My recipe", "samples=1")
    page = (tmp_path / "page.html").read_text()
    assert "<title>My recipe</title>" in page
    assert "Here are 1 of 3 prompts" in page
    assert not (tmp_path / "demo" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "folder=nowhere: there is no such folder"),
        (["empty"], "holds no run that has trained a step"),
        (["runs", "output=no/such/page.html"], "output=no/such/page.html: there is no folder no/such"),
        (["runs", "output=empty"], "output=empty: is a folder"),
    ],
)
def test_mistakes(rlhf: Forks, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_stage(tmp_path / "runs" / "sft", "sft")
    run = rlhf.run(tmp_path, "report", *arguments, code=2)
    assert message in run.output
    assert "Traceback" not in run.output


@pytest.fixture(scope="module")
def page(rlhf: Forks, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_recipe(tmp_path_factory.mktemp("runs") / "demo")
    rlhf.run(folder, "report", ".")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window_in_both_themes(browser: Browser, page: str, width: int, dark: bool) -> None:
    browser.look(width=width, dark=dark, phone=width < 500)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    lines = browser.run("getComputedStyle(document.querySelector('.picture text')).fill")
    assert (background, lines) == (
        ("rgb(20, 23, 27)", "rgb(229, 232, 236)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    )
    assert browser.problems == []


def test_what_models_said_is_shown_and_not_run(browser: Browser, page: str) -> None:
    browser.open(page)
    assert browser.run(f"{CARD}[0].querySelectorAll('.said')[1].textContent") == EVIL
    assert browser.run("document.querySelectorAll('main script, main img').length") == 1  # the data
    assert browser.problems == []


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(f"document.getElementById('{name}').value = '{value}'")
    browser.run(f"document.getElementById('{name}').dispatchEvent(new Event('input'))")


def test_filters(browser: Browser, page: str) -> None:
    browser.open(page)
    assert browser.run(f"[{COUNT}, {CARD}.length]") == ["3 of 3 prompts", 3]
    choose(browser, "category", "chat")
    assert browser.run(f"[{COUNT}, {CARD}.length, location.hash]") == ["2 of 3 prompts", 2, "#category=chat"]
    choose(browser, "winner", "ppo")
    assert browser.run(f"[{COUNT}, location.hash]") == ["1 of 3 prompts", "#category=chat&winner=ppo"]
    choose(browser, "q", "goodbye")
    assert browser.run(f"[{COUNT}, {CARD}.length]") == ["0 of 3 prompts", 0]
    choose(browser, "winner", "")
    assert browser.run(COUNT) == "1 of 3 prompts"
    assert browser.problems == []


def test_filters_come_from_the_address(browser: Browser, page: str) -> None:
    browser.open(f"{page}#winner=(nobody+alone)&judge=winrate%2C+judge+gold&q=sum")
    assert browser.run(COUNT) == "1 of 3 prompts"
    assert browser.run("document.getElementById('judge').value") == "winrate, judge gold"
    browser.open(f"{page}#category=%3Cscript%3E&page=99")
    assert browser.run(COUNT) == "3 of 3 prompts"
    assert browser.problems == []


def test_a_link_to_a_run_opens_it(browser: Browser, page: str) -> None:
    browser.open(f"{page}#run-ppo")
    assert browser.run("document.getElementById('run-ppo').open") is True
    assert browser.run("document.getElementById('run-sft').open") is False


def test_keys(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: '/', bubbles: true}))")
    assert browser.run("document.activeElement.id") == "q"
