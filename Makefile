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

bench: install  ## speed on this machine: benchmarks/results/<device>.json, the README's tables and the plots
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python benchmarks/report.py

# On a machine with a CUDA build of torch and no package registry: build in place, all tests, all benchmarks, part by
# part. A killed call is continued by the next: parts that passed with these sources are not repeated. $(OUT) holds a
# log and the results after every part.
OUT ?= build/gpu
PART_SECONDS ?= 300
GPU_PARTS ?= build tests-gpu tests $(patsubst benchmarks/bench_%.py,%,$(wildcard benchmarks/bench_*.py))
SOURCES := $(shell find ajepa kernels csrc tests benchmarks setup.py -name '*.py' -o -path 'csrc/*' -type f | sort)
PASSED := build/gpu/passed-$(shell cat $(SOURCES) | cksum | cut -d' ' -f1)
part = @mkdir -p $(OUT) $(PASSED); echo "== $(notdir $@): $(1)" | tee -a $(OUT)/gpu.log; \
	timeout $(PART_SECONDS) $(1) >$@.log 2>&1; code=$$?; tail -n 40 $@.log >>$(OUT)/gpu.log; tail -n 1 $@.log; \
	cp benchmarks/results/*.json $(OUT) 2>/dev/null; \
	case $$code in 0|5) touch $@;; *) echo "$(notdir $@) failed ($$code): $@.log" | tee -a $(OUT)/gpu.log;; esac

gpu: $(addprefix $(PASSED)/,$(GPU_PARTS))
	-$(PYTHON) benchmarks/report.py && cp benchmarks/results/plots/*.png $(OUT)
	@for part in $^; do test -e $$part || { echo "not all parts passed: see $(OUT)/gpu.log"; exit 1; }; done

$(PASSED)/build:
	$(call part,env AJEPA_CUDA_ARCHS=$(GPU_ARCH) $(PYTHON) -m pip install --no-build-isolation --no-deps -e .)

$(PASSED)/tests-gpu:
	$(call part,env AJEPA_TEST_MISSING=skip $(PYTHON) -m pytest -m gpu)

$(PASSED)/tests:
	$(call part,env AJEPA_TEST_MISSING=skip $(PYTHON) -m pytest -m 'not gpu' $(PARALLEL))

$(PASSED)/%:
	$(call part,$(PYTHON) -m pytest -s benchmarks/bench_$*.py)

GPU_ARCH = $$($(PYTHON) -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
PARALLEL = $$($(PYTHON) -c "import xdist" 2>/dev/null && echo -n 6)
