# Two commands set everything up: `make demo` (watch a text-only model get eyes) and `make test`.
# `make demo-real` shows the same with models and pictures that others made (186 MB, fetched once).
# `make check` is for those who change the code: lint, format, types.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo demo-real test check fuzz faults

demo: $(VENV)/installed
	$(BIN)/dianjing demo

demo-real: $(VENV)/installed-gguf
	$(BIN)/dianjing demo --real

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2

fuzz: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz 105000

faults: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "Dianjing needs Python 3.11 or newer; name one that is: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-gguf: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[gguf]'
	@touch $(VENV)/installed $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $(VENV)/installed $@
