# `make install` makes a virtual environment beside this file and installs diffalign into it, once; the other
# targets call it first. Override PYTHON=python3.12 or VENV=/elsewhere as you like; pip's own settings
# (PIP_INDEX_URL, PIP_NO_INDEX, pip.conf ...) are honoured.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
SEEDS ?= 0,1,2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.diffalign-installed
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST := $(BIN)/python -m pytest
# Groups of tests in the order of tests/conftest.py, not by their number.
PARALLEL := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: help install demo results bench bench-gpu bench-memory bench-growth bench-startup bench-scoring test test-fast test-all check format build clean

help:
	@echo "make demo       align the embedded model and write runs/demo/report.html (under five minutes)"
	@echo "make results    every method on the embedded models, seeds $(SEEDS), into docs/results.md; goes on where it was"
	@echo "make bench          pairs and pictures per second, against training and sampling as public scripts write them"
	@echo "make bench-gpu      training steps at real widths on a GPU, random weights; MINUTES=, CELLS=; goes on where it was"
	@echo "make bench-memory   memory of a training step at real widths, predicted without a GPU"
	@echo "make bench-growth   how a step grows with batch, resolution and processes, and a start with the number of pairs"
	@echo "make bench-startup  seconds to --help, to a mistake in a configuration, to the first step"
	@echo "make bench-scoring  pictures per second of a CLIP scorer, batched and one by one, and of the journal"
	@echo "make test       all tests that need neither network nor accelerator"
	@echo "make test-fast  the quick ones (a minute on two cores)"
	@echo "make test-all   everything, the tests that need the Hub or an accelerator included"
	@echo "make check      ruff, formatting and mypy"
	@echo "make format     let ruff mend what it can"
	@echo "make build      source distribution and wheel in dist/"
	@echo "make install    only the virtual environment in $(VENV)"
	@echo "make clean      remove build products and caches; $(VENV) and runs/ stay"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@PYTHON='$(PYTHON)' VENV='$(VENV)' sh scripts/install.sh
	@touch $@

demo: install
	@$(BIN)/diffalign demo

results: install
	@$(BIN)/python -m benchmarks.results --seeds $(SEEDS) $(if $(CELLS),--only $(CELLS))

bench: install
	@$(BIN)/python -m benchmarks.training_step
	@$(BIN)/python -m benchmarks.sampling

bench-gpu: install
	@$(BIN)/python -m benchmarks.real_widths $(if $(CELLS),--only '$(CELLS)') $(if $(MINUTES),--minutes $(MINUTES))

bench-memory: install
	@$(BIN)/python -m benchmarks.memory

bench-growth: install
	@$(BIN)/python -m benchmarks.step_growth
	@$(BIN)/python -m benchmarks.data_growth

bench-startup: install
	@$(BIN)/python -m benchmarks.startup

bench-scoring: install
	@$(BIN)/python -m benchmarks.scoring $(if $(FULL_SIZE),--full-size)

test: install
	@$(OFFLINE) $(PYTEST) $(PARALLEL) -m "not gpu and not network"

test-fast: install
	@$(OFFLINE) $(PYTEST) $(PARALLEL) -m "not slow and not gpu and not network"

test-all: install
	@HF_HUB_OFFLINE=0 $(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: install
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +
