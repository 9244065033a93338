# Every target does its own set-up: an environment in .venv, made with $(PYTHON).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# `install` and `dev` write to the same environment.
.NOTPARALLEL:
.PHONY: help install dev demo compose-demo test test-system test-crash test-matrix lint bench clean

help:
	@echo "make demo         train ten clients on Flower's simulation; prints where the results are"
	@echo "make compose-demo a server and three clients in containers (Docker), with TLS and keys"
	@echo "make test         the test suite"
	@echo "make test-system  the long tests: fresh clones, real processes"
	@echo "make test-crash   servers and nodes that are killed at random moments, full disks"
	@echo "make test-matrix  every meaningful combination of strategies and regularizers"
	@echo "make lint         ruff"
	@echo "make bench        the benchmarks, each as a table"

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed-dev: EXTRAS := [dev]
$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable '.$(EXTRAS)'
	@# On all processors; pip would compile in one process.
	@$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true
	@touch $(VENV)/.installed $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/flatfed run engine.name=ray run.output-dir="$(CURDIR)/results"

compose-demo:
	@docker/demo.sh

# Tests that start many processes run by themselves, two files at a time.
FAST := -m "not long and not crash and not matrix"
test: dev
	$(BIN)/python -m pytest $(FAST) --ignore tests/system -n auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest $(FAST) tests/system -n 2 --dist loadfile

test-system: dev
	$(BIN)/python -m pytest -m long

test-crash: dev
	$(BIN)/python -m pytest -m crash

test-matrix: dev
	$(BIN)/python -m pytest -q -m matrix

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A missed bar does not keep the others from being measured.
bench: install
	-$(BIN)/python -m benchmarks.overhead
	-$(BIN)/python -m benchmarks.eager
	-$(BIN)/python -m benchmarks.rules
	-$(BIN)/python -m benchmarks.regularizers
	-$(BIN)/python -m benchmarks.scale
	-$(BIN)/python -m benchmarks.startup
	-$(BIN)/python -m benchmarks.roundtrip
	-$(BIN)/python -m benchmarks.workers
	-$(BIN)/python -m benchmarks.cohort
	-$(BIN)/python -m benchmarks.fedpart
	-$(BIN)/python -m benchmarks.flatness

clean:
	rm -rf $(VENV) build *.egg-info
