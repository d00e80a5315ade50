# Every target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
BENCH_ARGS ?=

.PHONY: demo test test-all lint bench docs clean

demo: $(VENV)/.demo
	$(BIN)/tesseract demo $(DEMO_ARGS)

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m ""

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything, one after another, and one table; `make bench BENCH_ARGS="throughput ceilings"` runs some of it.
bench: $(VENV)/.dev
	-$(PYTHON) tests/benchmarks/peers/install.py  # without it only the comparison with hivemind is missing
	$(BIN)/python -m tests.benchmarks $(BENCH_ARGS)

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: an open range would fetch gigabytes of CUDA libraries onto machines without a GPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	@touch $@

docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-hivemind .mypy_cache .pytest_cache .ruff_cache .hypothesis
