PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: train test install lint format bench

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

bench: install  ## speed on this machine: benchmarks/results/<device>.json, the README's tables and the plots
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python benchmarks/report.py

# `make gpu` measures on a GPU within BUDGET seconds, the most important things first. Lines, log and results go to
# $(OUT). A second call goes on with what is missing; EARLIER names files of lines that count as measured already.
# DEVICE=cpu rehearses the run. A CUDA build of torch is needed, and no package registry: `make prebuilt` makes, on any
# machine, what would otherwise be compiled or downloaded there. Copy its folder prebuilt/ along with the tree. Without
# that folder the run builds for itself and says what it cost.
OUT ?= build/gpu
BUDGET ?= 540
DEVICE ?= auto
PARTS ?=
EARLIER ?=
HERE = $(shell $(PYTHON) -c "import importlib.util as u; print('$(PYTHON)' if u.find_spec('torch') else '$(BIN)/python')")
RUN = $(HERE) benchmarks/gpu.py --out $(OUT) $(addprefix --earlier ,$(EARLIER))

.PHONY: gpu gpu-report prebuilt
gpu:
	@test -n "$$(command -v $(HERE))" || $(MAKE) install
	@$(RUN) --device $(DEVICE) --budget $(BUDGET) --parts "$(PARTS)"

gpu-report:  ## result files, tables and plots from the lines in $(OUT), here or anywhere
	@test -n "$$(command -v $(HERE))" || $(MAKE) install
	@$(RUN) --report

prebuilt: install  ## the extension for GPU_ARCHS, wheels, and Triton's kernels for the GPU machine's Python
	$(BIN)/python benchmarks/prebuilt.py --archs $(GPU_ARCHS) --python $(GPU_PYTHON)
GPU_ARCHS ?= 90
GPU_PYTHON ?= 3.12
