# All commands of the project. Each one first installs what it needs into .venv, once: a stamp file remembers the set of
# extras, and is out of date when pyproject.toml or constraints.txt changes.

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
BIN         := $(VENV)/bin

CONFIG ?= configs/recipes/lm_tiny.yaml
# One process per GPU; two on a machine without GPUs.
NPROC  ?= $(shell $(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)')

EXTRAS_train := train,kernels
EXTRAS_sweep := train,kernels,images
EXTRAS_test  := train,images,kernels,test,deepspeed,mpi
EXTRAS_lint  := train,images,kernels,test,deepspeed,mpi,dev
EXTRAS_docs  := docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train sweep test test-slow test-gpu lint format bench soak docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.installed-train ## train a small language model on two ranks (ARGS="key=value ...", NPROC=n, CONFIG=file)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) \
	    -m adai_dist train --config $(CONFIG) $(ARGS)

sweep: $(VENV)/.installed-sweep ## compare six optimizers on scanned digits, three seeds each (ARGS="options")
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/adai-dist sweep --config configs/recipes/digits_cnn.yaml $(ARGS)

test: $(VENV)/.installed-test ## run the tests, less those marked slow or gpu (ARGS="pytest options")
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/.installed-test ## run the tests marked slow
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600 $(ARGS)

test-gpu: $(VENV)/.installed-test ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.installed-lint ## ruff, pyright (strict on adai_dist), codespell, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pyright --verifytypes adai_dist --ignoreexternal
	$(BIN)/codespell
	$(BIN)/shellcheck .ci/run launch/*.sh launch/*.sbatch

format: $(VENV)/.installed-lint ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-train ## measure the optimizer on this machine (ARGS="options of adai-dist bench")
	$(BIN)/adai-dist bench $(ARGS)

soak: $(VENV)/.installed-train ## train 100,000 steps on two ranks and watch drift and memory (ARGS="options", NPROC=n)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) \
	    -m adai_dist soak $(ARGS)

docs: $(VENV)/.installed-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove what the commands made, except .venv and runs/
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find adai_dist tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: the other packages then find the build of it that was chosen, and keep it.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS_$*)]'
	@touch $@
