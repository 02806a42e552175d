PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: train test install lint format bench gpu

train: install  ## train the embedded default to its end; a second call finds it finished
	$(BIN)/python -m ajepa.train --out runs/tiny --resume

test: install
	$(BIN)/python -m pytest

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test,lint]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## speed of every kernel on this machine, into benchmarks/results/<device>.json
	$(BIN)/python -m pytest benchmarks

gpu:  ## on a machine with a CUDA build of torch: build in place, all tests, all benchmarks
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m pytest benchmarks
