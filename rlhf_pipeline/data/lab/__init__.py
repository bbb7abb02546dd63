"""The demo lab: a small village where the truth is known, so that every claim of the recipe can be measured.

`sets.rows` makes the files, `judge.judge` scores any answer to any prompt of the lab, `labelers` stand for people,
`summary` turns verdicts into figures. docs/lab.md says what is in it and what it can and cannot show.
"""

from __future__ import annotations

# Raised with every change of the tasks or the judge: scores of two versions are not comparable.
VERSION = 1
