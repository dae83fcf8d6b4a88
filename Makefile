# Each target makes what it needs: `make quickstart` or `make test` in a fresh clone is enough.
# On another interpreter: `make test PYTHON=python3.12`. More arguments: `make quickstart ARGS=--config.seed=1`.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Of the package, for the tests; `make test-fast EXTRAS=test` does without the reference implementation.
EXTRAS ?= test,reference
BIN := $(VENV)/bin
METADATA := setup.cfg pyproject.toml

# XLA takes new memory for its buffers at every step: with large pages a step of the quickstart takes 0.70 to 0.74
# of the time (benchmarks/large_pages.py). Where the C library is not glibc, this does nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help quickstart preview test test-fast parity lint format types bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/.installed ## Train, evaluate and export the small model; a few minutes on two CPU cores
	$(BIN)/gemma4 train --config=configs/quickstart.py $(ARGS)

preview: $(VENV)/.installed ## Write preview.html: the first packed rows of the quickstart
	$(BIN)/gemma4 preview --config=configs/quickstart.py $(ARGS)

test: $(VENV)/.installed-test ## Run every test, with the live comparison against the reference implementation
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadscope --no-loadscope-reorder $(ARGS)

test-fast: $(VENV)/.installed-test ## Run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

parity: $(VENV)/.installed-test ## Compare with the reference once more, compiled as users compile
	$(BIN)/python -m pytest --numprocesses=auto --optimize -m "not slow" tests/hf/test_parity.py tests/hf/test_golden.py $(ARGS)

lint: $(VENV)/.installed-dev ## Check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed-dev ## Rewrite files in the agreed style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Type checkers read folders, not setup.cfg: put the package together as it installs, and check that.
types: $(VENV)/.installed-dev ## Check types
	@rm -rf build/types
	@$(BIN)/python -c "import setuptools; setuptools.setup()" --quiet build_py --build-lib build/types
	$(BIN)/mypy

bench: $(VENV)/.installed ## Print the figures of the quickstart
	$(BIN)/python benchmarks/quickstart.py $(ARGS)

clean: ## Remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The stamps: an installation is repeated only when the metadata is newer.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "gemma4-jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.installed
