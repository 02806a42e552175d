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
# part; what the goals ask for first. A killed call is continued by the next: parts that passed with these sources are
# not repeated. $(OUT) holds a log, the results and plots of this device after every part. WHEELS: a folder of packages to
# install first, as `make wheels` fills it on a machine with a registry.
OUT ?= build/gpu
WHEELS ?= wheels
PART_SECONDS ?= 300
FIRST := adamw_ema attention latent_loss layer_norm gelu_mlp log_mel train_step end_to_end
BENCHMARKS := $(patsubst benchmarks/bench_%.py,%,$(wildcard benchmarks/bench_*.py))
GPU_PARTS ?= build tests-gpu $(FIRST) $(filter-out $(FIRST),$(BENCHMARKS)) tests
SOURCES := $(shell find ajepa kernels csrc tests benchmarks setup.py -name '*.py' -o -path 'csrc/*' -type f | sort)
PASSED := build/gpu/passed-$(shell cat $(SOURCES) | cksum | cut -d' ' -f1)
part = @mkdir -p $(OUT) $(PASSED); echo "== $(notdir $@): $(1)" | tee -a $(OUT)/gpu.log; \
	timeout $(PART_SECONDS) $(1) >$@.log 2>&1; code=$$?; tail -n 40 $@.log >>$(OUT)/gpu.log; tail -n 1 $@.log; \
	cp $(RESULT) $(OUT) 2>/dev/null; \
	case $$code in 0|5) touch $@;; *) echo "$(notdir $@) failed ($$code): $@.log" | tee -a $(OUT)/gpu.log;; esac

gpu: $(addprefix $(PASSED)/,$(GPU_PARTS))
	-$(PYTHON) benchmarks/report.py && result=$(RESULT) && cp benchmarks/results/plots/$$(basename $$result .json)*.png $(OUT) 2>/dev/null
	@for part in $^; do test -e $$part || { echo "not all parts passed: see $(OUT)/gpu.log"; exit 1; }; done

$(PASSED)/build:
	@test -z "$(wildcard $(WHEELS)/*.whl)" || $(PYTHON) -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl
	$(call part,env AJEPA_CUDA_ARCHS=$(GPU_ARCH) $(PYTHON) -m pip install --no-build-isolation --no-deps -e .)

$(PASSED)/tests-gpu:
	$(call part,env AJEPA_TEST_MISSING=skip $(PYTHON) -m pytest -m gpu $(PARALLEL))

$(PASSED)/tests:
	$(call part,env AJEPA_TEST_MISSING=skip $(PYTHON) -m pytest -m 'not gpu' $(PARALLEL))

$(PASSED)/%:
	$(call part,$(PYTHON) -m pytest -s benchmarks/bench_$*.py)

GPU_ARCH = $$($(PYTHON) -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
PARALLEL = $$($(PYTHON) -c "import xdist" 2>/dev/null && printf -- '-n 6')
RESULT = $$(cd benchmarks && $(PYTHON) -c "import records; print(records.results_path())")

# What CUDA images lack, but for DALI, whose 200 MB only compressed recordings need.
GPU_PYTHON ?= 3.12
.PHONY: wheels
wheels: install
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) -d $(WHEELS) \
		soundfile cffi pycparser soxr isal tyro docstring-parser typeguard pydantic \
		$$($(BIN)/python -c "from importlib.metadata import requires; print(*(r for r in requires('pydantic') if ';' not in r))")
