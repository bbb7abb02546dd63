# Every target does its own set-up on a fresh machine. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RLHF := $(BIN)/rlhf
DEMO := runs/demo
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider

.PHONY: help setup demo test test-full lint types bench bench-sft bench-rm bench-ppo bench-dpo bench-data bench-generation golden clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(VENV)/ready ## a virtual environment with pinned versions

# torch first and by itself: asked for through another package, an index may answer with a build of several gigabytes.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup $(DEMO)/rm/artifact/artifact.json ## make a small language model, fine-tune it, train a reward model, judge all: minutes, no download
	@$(RLHF) evaluate experiment=demo_evaluate
	@$(RLHF) evaluate experiment=demo_rm_evaluate

# A stage is made when its artifact is missing or older than its parent's; a run that was interrupted goes on.
$(DEMO)/pretrain/artifact/artifact.json:
	$(RLHF) pretrain experiment=demo_pretrain

$(DEMO)/sft/artifact/artifact.json: $(DEMO)/pretrain/artifact/artifact.json
	$(RLHF) sft experiment=demo_sft

$(DEMO)/rm/artifact/artifact.json: $(DEMO)/sft/artifact/artifact.json
	$(RLHF) rm experiment=demo_rm

test: setup ## all tests but the long matrices, under ten minutes on two cores
	$(PYTEST) -m "not slow" -n 2 --dist worksteal

test-full: setup ## the long matrices too
	$(PYTEST) -n 2 --dist worksteal

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy
	$(BIN)/mypy

bench: bench-sft bench-rm bench-ppo bench-dpo ## every stage's speed side by side with TRL, in environments of its own

bench-sft: setup ## SFT speed side by side with TRL
	$(BIN)/python scripts/bench/run.py

bench-rm: setup ## reward model speed side by side with TRL; reads the folder RLHF_TEST_DATA
	$(BIN)/python scripts/bench/rm.py

bench-ppo: setup ## PPO speed side by side with TRL 1.12, and sampling beside generate; reads the folder RLHF_TEST_DATA
	$(BIN)/python scripts/bench/ppo.py

bench-dpo: setup ## DPO speed side by side with TRL; reads the folder RLHF_TEST_DATA
	$(BIN)/python scripts/bench/dpo.py

bench-data: setup ## how fast files become tokens, and in how much memory; reads the folder RLHF_TEST_DATA
	$(BIN)/python scripts/bench/data.py

bench-generation: setup ## sampling beside transformers' generate
	$(BIN)/python scripts/bench/generate.py

golden: setup ## write the golden curves anew; say why in the commit
	$(BIN)/python -m pytest tests/golden --write-golden

clean: ## remove the demo's runs
	rm -rf $(DEMO)
