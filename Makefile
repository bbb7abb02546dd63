# Every target does its own set-up on a fresh machine. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RLHF := $(BIN)/rlhf
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider

.PHONY: help setup demo recipe test test-full lint types bench bench-sft bench-rm bench-ppo bench-dpo bench-data bench-generation golden faults clean
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

# `make recipe EXP=instructgpt_1b` is the same as `make demo` with conf/experiment/instructgpt_1b_<stage>.yaml. A stage whose
# file is not there is left out. ARGS are overrides of every stage, ARGS_sft and so on of one; GPUS starts that many processes.
EXP ?= demo
RUNS ?= runs
ARGS ?=
GPUS ?= 1
DIR := $(RUNS)/$(EXP)
has = $(wildcard conf/experiment/$(EXP)_$(1).yaml)
made = $(1)/artifact/artifact.json
LAUNCH = $(if $(filter-out 1,$(GPUS)),$(RLHF) launch --num-processes $(GPUS),$(RLHF))
train = $(LAUNCH) $(1) experiment=$(2) runs=$(RUNS) $(ARGS) $(ARGS_$(1))
# The reward model of InstructGPT's policies has 6B whatever their size; the policy that PPO starts from has a file of its own.
RM_EXP ?= $(if $(call has,rm),$(EXP),$(if $(filter instructgpt_%,$(EXP)),instructgpt_6b))
INIT := $(if $(call has,ppo_init_sft),$(EXP)_ppo_init)
REWARD := $(if $(RM_EXP),$(call made,$(RUNS)/$(RM_EXP)/rm))
policies = $(foreach s,$(1),$(if $(call has,$(s)),$(call made,$(DIR)/$(s))))
MODELS := $(call policies,pretrain sft) $(REWARD) $(call policies,ppo dpo)
EVALUATIONS := $(patsubst conf/experiment/%.yaml,$(DIR)/evaluated/%,$(wildcard $(addprefix conf/experiment/$(EXP),_evaluate.yaml _*_evaluate.yaml)))

demo: recipe ## the whole recipe on the lab, base model to report: minutes on two cores, no download

recipe: setup $(MODELS) $(EVALUATIONS) ## the same for EXP=<name>: conf/experiment/<name>_<stage>.yaml
	@$(RLHF) report $(DIR)

# A stage is made when its artifact is missing or older than its parents'; a run that was interrupted goes on.
$(call made,$(DIR)/pretrain):
	$(call train,pretrain,$(EXP)_pretrain)

$(call made,$(DIR)/sft): $(if $(call has,pretrain),$(call made,$(DIR)/pretrain))
	$(call train,sft,$(EXP)_sft)

ifneq ($(INIT),)
$(call made,$(RUNS)/$(INIT)/sft):
	$(call train,sft,$(INIT)_sft)
endif

ifneq ($(RM_EXP),)
$(REWARD): $(if $(filter $(EXP),$(RM_EXP)),$(if $(call has,sft),$(call made,$(DIR)/sft)))
	$(call train,rm,$(RM_EXP)_rm)
endif

$(call made,$(DIR)/ppo): $(if $(INIT),$(call made,$(RUNS)/$(INIT)/sft),$(if $(call has,sft),$(call made,$(DIR)/sft))) $(REWARD)
	$(call train,ppo,$(EXP)_ppo)

$(call made,$(DIR)/dpo): $(if $(call has,sft),$(call made,$(DIR)/sft))
	$(call train,dpo,$(EXP)_dpo)

# What the demo's reward model and direct objective learn from: labelers rank the fine-tuned model's own answers.
$(RUNS)/demo/generate/responses.jsonl: $(call made,$(RUNS)/demo/sft)
	$(RLHF) generate experiment=demo_samples_generate runs=$(RUNS) $(ARGS_generate)

$(RUNS)/demo/own_rankings.jsonl: $(RUNS)/demo/generate/responses.jsonl
	$(BIN)/python scripts/lab_label.py $< $@ --by panel

$(call made,$(RUNS)/demo/rm) $(call made,$(RUNS)/demo/dpo): $(RUNS)/demo/own_rankings.jsonl

# The judge ranks its answers to held-out prompts, to see how good the reward model is.
$(RUNS)/demo/heldout/responses.jsonl: $(call made,$(RUNS)/demo/sft)
	$(RLHF) generate experiment=demo_heldout_generate runs=$(RUNS) $(ARGS_generate)

$(RUNS)/demo/heldout_rankings.jsonl: $(RUNS)/demo/heldout/responses.jsonl
	$(BIN)/python scripts/lab_label.py $< $@ --by gold

$(RUNS)/demo/evaluated/demo_rm_evaluate: $(RUNS)/demo/heldout_rankings.jsonl

$(DIR)/evaluated/%: $(MODELS)
	$(RLHF) evaluate experiment=$* runs=$(RUNS) $(ARGS_evaluate)
	@mkdir -p $(@D) && touch $@

test: setup ## all tests but the long matrices, under ten minutes on two cores
	$(PYTEST) -m "not slow" -n 3 --dist worksteal

test-full: setup ## the long matrices too
	$(PYTEST) -n 3 --dist worksteal

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

NUMBER ?= 250
SEED ?= 1
faults: setup ## hurt every command in NUMBER ways drawn from SEED, and print what became of it; about half an hour
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults --number $(NUMBER) --seed $(SEED)

clean: ## remove the demo's runs
	rm -rf runs/demo
