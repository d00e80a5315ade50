# Every target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
# many tests wait for other processes: one worker more than there are cores keeps the cores busy (240 s, not 400, on two)
WORKERS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')

.PHONY: demo test test-all lint bench newcomer docs docs-refresh package clean

demo: $(VENV)/.demo
	$(BIN)/tesseract demo $(DEMO_ARGS)

# each process of the tests would compile the package anew where the environment forbids to keep what was compiled
test test-all: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-all: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m ""

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything, one after another, and one table; `make bench BENCH_ARGS="throughput ceilings"` runs some of it.
bench: $(VENV)/.dev
	-$(PYTHON) tests/benchmarks/peers/install.py  # without it only the comparisons with the peers are missing
	$(BIN)/python -m tests.benchmarks $(BENCH_ARGS)

# A newcomer's path in a clone and an environment of its own, timed: minutes, most of them pip's.
newcomer:
	$(PYTHON) tests/newcomer/path.py

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: an open range would fetch gigabytes of CUDA libraries onto machines without a GPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dashboard]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	@touch $@

# The site, in site/; a warning is an error.
docs: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dashboard,docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and source archive, in dist/; the wheel is then installed into an environment of its own and tried.
package: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) tests/newcomer/wheel.py dist

# The outputs that README and tutorial show, by doing what they say; then the figures of bench.json, if there are any.
docs-refresh: $(VENV)/.dev
	$(BIN)/python docs/session.py
	test ! -f bench.json || $(BIN)/python docs/plots.py

clean:
	rm -rf $(VENV) dist .venv-hivemind .venv-rpc .mypy_cache .pytest_cache .ruff_cache .hypothesis
