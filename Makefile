# All commands of the project. Each one first installs what it needs into .venv, once: a stamp file remembers it, and is out
# of date when pyproject.toml or constraints.txt changes.

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip install --disable-pip-version-check

CONFIG ?= lm_tiny
# One process per GPU; two on a machine without GPUs.
NPROC  ?= $(shell $(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)')

# Tests of one file share what they have made, and stay together.
PARALLEL := --numprocesses 2 --dist loadfile

# What a command needs: extras of the package, and dependency groups beside it.
INSTALL_train := -e '.[train,kernels]'
INSTALL_sweep := -e '.[train,kernels,images]'
INSTALL_test  := -e '.[all]' --group test
INSTALL_lint  := -e '.[all]' --group lint
INSTALL_docs  := -e . --group docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train sweep test check test-slow test-gpu lint format bench soak docs dist constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.installed-train ## train a small language model on two ranks (ARGS="key=value ...", NPROC=n, CONFIG=recipe)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) \
	    -m adai_dist train --config $(CONFIG) $(ARGS)

sweep: $(VENV)/.installed-sweep ## compare six optimizers on scanned digits, three seeds each (ARGS="options")
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/adai-dist sweep --config digits_cnn $(ARGS)

test: $(VENV)/.installed-test ## run the core of the tests, in two processes (ARGS="pytest options")
	$(BIN)/python -m pytest $(PARALLEL) -m "not exhaustive and not slow and not gpu" $(ARGS)

check: $(VENV)/.installed-test ## run all tests, less those marked slow or gpu (ARGS="pytest options")
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)

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
	$(BIN)/shellcheck .ci/run .ci/smoke launch/*.sh launch/*.sbatch

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

dist: $(VENV)/.installed-release ## build sdist and wheel into dist/, and use each in an empty environment and folder
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	for file in dist/*; do .ci/smoke "$$file" || exit; done

# CUDA's libraries are left to torch: each of its releases asks for exact versions of them, and CPU builds for none.
constraints: $(VENV)/.installed-release ## renew constraints.txt; what it pins stays (ARGS="--upgrade", "--upgrade-package NAME")
	UV_CUSTOM_COMPILE_COMMAND="make constraints" $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
	    --all-extras --group test --group lint --group docs --group release --no-annotate \
	    --output-file constraints.txt pyproject.toml $(ARGS)
	sed -i -E '/^(cuda|nvidia|triton)/d' constraints.txt

clean: ## remove what the commands made, except .venv and runs/
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find adai_dist tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Building needs no torch.
$(VENV)/.installed-release: pyproject.toml | $(BIN)/python
	$(PIP) 'pip>=25.1'
	$(PIP) -c $(CONSTRAINTS) --group release
	@touch $@

# The pip of a new environment may be too old for dependency groups. torch goes first and alone: the other packages then
# find the build of it that was chosen, and keep it.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) 'pip>=25.1'
	$(PIP) -c $(CONSTRAINTS) torch
	$(PIP) -c $(CONSTRAINTS) $(INSTALL_$*)
	@touch $@
