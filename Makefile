# All commands of the project. Each one first installs its dependencies into .venv, once: a stamp file records it, and
# is out of date when pyproject.toml or constraints.txt changes.

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip install --disable-pip-version-check

CONFIG ?= lm_tiny
# One process per GPU; two on a machine without GPUs.
NPROC  ?= $(shell $(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)')

# Tests of one file share fixtures, and stay in one process.
PARALLEL := --numprocesses 2 --dist loadfile

# The dependencies of each command: extras of the package, and dependency groups.
INSTALL_train := -e '.[train,kernels]'
INSTALL_sweep := -e '.[train,kernels,images]'
INSTALL_test  := -e '.[all]' --group test
INSTALL_lint  := -e '.[all]' --group lint
INSTALL_docs  := -e . --group docs

# The oldest release of DeepSpeed that pyproject.toml allows, without its dependencies: it takes those of the newest.
OLDEST := build/deepspeed-$(shell sed -n 's/^deepspeed = ."deepspeed>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train sweep test check check-oldest test-slow test-gpu test-versions lint format bench soak docs dist constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.installed-train ## train a small language model on two ranks (ARGS="key=value ...", NPROC=n, CONFIG=recipe)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) \
	    -m adai_dist train --config $(CONFIG) $(ARGS)

sweep: $(VENV)/.installed-sweep ## compare six optimizers on scanned digits, three seeds each (ARGS="options")
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/adai-dist sweep --config digits_cnn $(ARGS)

test: $(VENV)/.installed-test ## run the core tests, in two processes (ARGS="pytest options")
	$(BIN)/python -m pytest $(PARALLEL) -m "not exhaustive and not slow and not gpu" $(ARGS)

check: $(VENV)/.installed-test ## run all tests except those marked slow or gpu (ARGS="pytest options")
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)
	$(if $(ARGS),,$(MAKE) check-oldest)

check-oldest: $(VENV)/.installed-test $(OLDEST) ## run the steps of every ZeRO stage with the oldest supported DeepSpeed
	PYTHONPATH=$(abspath $(OLDEST)) $(BIN)/python -m pytest $(PARALLEL) $(ARGS) \
	    $(addprefix tests/integrations/test_deepspeed_,parity.py releases.py mixed_gradients.py)

test-slow: $(VENV)/.installed-test ## run the tests marked slow
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600 $(ARGS)

test-gpu: $(VENV)/.installed-test ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-versions: $(VENV)/.installed-versions ## run tests against other versions, and write docs/versions.md (ARGS="-s torch-2.6")
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nox $(ARGS)

lint: $(VENV)/.installed-lint ## ruff, pyright (strict on adai_dist), codespell, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pyright --verifytypes adai_dist --ignoreexternal
	$(BIN)/codespell
	$(BIN)/shellcheck .ci/run .ci/smoke launch/*.sh launch/*.sbatch

format: $(VENV)/.installed-lint ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-train ## measure the optimizer on this machine (ARGS="options of adai-dist bench")
	$(BIN)/adai-dist bench $(ARGS)

soak: $(VENV)/.installed-train ## train 100,000 steps on two ranks and check drift and memory (ARGS="options", NPROC=n)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) \
	    -m adai_dist soak $(ARGS)

docs: $(VENV)/.installed-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.installed-release ## build sdist and wheel into dist/, and test each in an empty environment and folder
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	for file in dist/*; do .ci/smoke "$$file" || exit; done

# CUDA's libraries are left to torch: each of its releases requires exact versions of them, and CPU builds none.
constraints: $(VENV)/.installed-release ## update constraints.txt, keeping its pins (ARGS="--upgrade", "--upgrade-package NAME")
	UV_CUSTOM_COMPILE_COMMAND="make constraints" $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
	    --all-extras --group test --group lint --group docs --group release --group versions --no-annotate \
	    --output-file constraints.txt pyproject.toml $(ARGS)
	sed -i -E '/^(cuda|nvidia|triton)/d' constraints.txt

clean: ## remove the outputs of the commands, except .venv and runs/
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find adai_dist tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(OLDEST): | $(VENV)/.installed-test
	$(PIP) --no-deps --target $@ '$(subst -,==,$(notdir $@))'

# These need no torch: they build, or test in environments of their own.
$(VENV)/.installed-release $(VENV)/.installed-versions: $(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(PIP) 'pip>=25.1'
	$(PIP) -c $(CONSTRAINTS) --group $*
	@touch $@

# The pip of a new environment may be too old for dependency groups. torch is installed first and separately, so that the
# other packages keep the chosen build.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) 'pip>=25.1'
	$(PIP) -c $(CONSTRAINTS) torch
	$(PIP) -c $(CONSTRAINTS) $(INSTALL_$*)
	@touch $@
