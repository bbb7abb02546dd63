"""Tracking: no secret is written anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers_tracking import HEX40, HF_TOKEN

from rlhf_pipeline.tracking import redact, redact_text


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "hub.token",
        "accessToken",
        "API_KEY",
        "apiKey",
        "wandb-api-key",
        "key",
        "secret_access_key",
        "secret",
        "client_secret",
        "password",
        "db_password",
        "authorization",
        "api_keys",
    ],
)
def test_values_of_secret_keys_are_hidden(key: str) -> None:
    assert redact({key: "plain words"}) == {key: "***"}
    assert redact({"a": [{key: {"inner": ["plain words"]}}]}) == {"a": [{key: {"inner": ["***"]}}]}


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "max_tokens",
        "token_budget",
        "keys",
        "num_tokens",
        "pad_token",
        "eos_token",
        "tokens_per_second",
        "loss_per_token",
        "keyboard",
        "monkey",
        "prompt_key",
        "sort_key",
        "key_column",
        "secretary",
        "author",
        "password_file",
    ],
)
def test_values_of_harmless_keys_stay(key: str) -> None:
    config = {key: "plain words", "nested": {key: ["plain words", 3, None]}}
    assert redact(config) == config


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HF_TOKEN, "***"),
        (f"use {HF_TOKEN}, please", "use ***, please"),
        ("sk-proj-abcdefghij0123456789", "***"),
        ("ghp_" + "a1" * 18, "***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_1", "***"),
        ("Bearer abcdefghijklmnop1234", "Bearer ***"),
        ("https://user:pa@ss:word@host/path?x=1", "https://***@host/path?x=1"),
        ("https://0123token@host/path", "https://***@host/path"),
        ("postgres://u:p@db:5432/x", "postgres://***@db:5432/x"),
        ("hub.token=abc lr=0.1", "hub.token=*** lr=0.1"),
        ("https://host/?api_key=abc&b=2", "https://host/?api_key=***&b=2"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)
def test_credentials_are_hidden_in_any_text(text: str, shown: str) -> None:
    assert redact_text(text) == shown
    assert redact({"note": [text]}) == {"note": [shown]}
    assert redact({"path": Path("/x") / "y"}) == {"path": Path("/x/y")}


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.2-1B",
        "ssh://git@host/repo",
        "https://host/a@b",
        "hf_hub",
        "risk-averse-policies-of-2024-and-later",
        "sk-learn-like-names-are-fine-too",
        "max_tokens=5",
        f"/cache/models--a--b/snapshots/{HEX40}/config.json",
        "a" * 64,
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact({"note": text}) == {"note": text}


def test_forty_hex_digits_are_a_wandb_key_unless_a_commit() -> None:
    config = {"note": HEX40, "revision": HEX40, "git_commit": HEX40, "listed": [f" {HEX40} "]}
    assert redact(config) == {"note": "***", "revision": HEX40, "git_commit": HEX40, "listed": ["***"]}


def test_numbers_and_nothing_are_judged_by_the_key() -> None:
    config = {"token": 7, "password": 1234, "secret": None, "use_auth": True, "auth": "", "lr": 0.1}
    assert redact(config) == {**config, "password": "***"}


def test_nested_objects_do_not_carry_a_secret_past_the_mask() -> None:
    @dataclass
    class Hub:
        token: str
        repo: str

    class Pair(NamedTuple):
        left: str
        right: str

    assert redact({"hub": Hub("plain", "a/b"), "pair": Pair("x", HF_TOKEN)}) == {
        "hub": {"token": "***", "repo": "a/b"},
        "pair": ("x", "***"),
    }


def test_redact_does_not_change_its_argument() -> None:
    config = {"a": {"token": "x"}, "b": ["https://u:p@h"], "c": ("y", {"password": "z"})}
    before = repr(config)
    assert redact(config) == {"a": {"token": "***"}, "b": ["https://***@h"], "c": ("y", {"password": "***"})}
    assert repr(config) == before
