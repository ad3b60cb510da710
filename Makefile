# make demo   set up .venv (6.4 GB, 5 minutes), train on slides with the monitor, write demo/report.html (7 minutes)
# make test   set up .venv, run every test
# make lint | fmt | docs | bench

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# One process more than cores: some tests wait, for a database or a process that ends.
PROCESSES = $(shell $(BIN)/python -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))')

# Packages are installed without bytecode. The first import writes it, also where the environment forbids that, as
# images of Docker often do: every process that imports torch and Lightning would otherwise compile them again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint fmt docs bench clean

demo: $(READY)
	$(BIN)/fmtrain demo --out demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal --durations 40

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(READY)
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "repmetrics needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --upgrade --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo docs/_build .mypy_cache .pytest_cache .ruff_cache
