PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: train test aot install lint format docs bench

train: install  ## train the embedded default to its end; a second call finds it finished
	$(BIN)/python -m ajepa.train --out runs/tiny --resume

# TEST_WORKERS processes share the tests. One that has finished its part takes tests from another.
TEST_WORKERS ?= 2
test: install
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

# Compiles every shipped kernel for GPUs that need not be here, and checks the compiler's reports. `make aot TRITON=3.6.0`
# does so with another version, which is installed beside the environment.
TRITON ?=
aot: install
	test -z "$(TRITON)" -o -d build/triton-$(TRITON) || \
		$(BIN)/python -m pip install --quiet --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(if $(TRITON),build/triton-$(TRITON)) AJEPA_AOT=all $(BIN)/python -m pytest tests/kernels/test_aot.py

# pip before 26.2 applies PIP_CONSTRAINT in its build environment as well; from 26.2 on, PIP_BUILD_CONSTRAINT does.
CONSTRAINTS ?= constraints.txt
install: $(VENV)/installed

$(VENV)/installed: export PIP_CONSTRAINT = $(CONSTRAINTS)
$(VENV)/installed: export PIP_BUILD_CONSTRAINT = $(CONSTRAINTS)
$(VENV)/installed: pyproject.toml setup.py $(wildcard $(CONSTRAINTS) csrc/*.* csrc/hopper/*.*)
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

docs: $(VENV)/docs-installed  ## the documentation as a site, in build/site; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The project is installed already, so pip adds the packages of its extra alone and builds nothing.
$(VENV)/docs-installed: export PIP_CONSTRAINT = $(CONSTRAINTS)
$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet 'ajepa[docs]'
	touch $@

HUB ?= build/hub
.PHONY: hub
hub: install  ## ajepa_kernels in the layout of the Hugging Face Kernel Hub, in HUB; `kernels` loads that folder
	$(BIN)/python kernels/hub_layout.py $(HUB)

bench: install  ## speed on this machine: benchmarks/results/<device>.json, the documentation's tables and the plots
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python benchmarks/report.py

# `make gpu` measures on a GPU within BUDGET seconds, the most important things first. Lines, log and results go to
# $(OUT). A second call measures what is missing. EARLIER names files of lines from earlier calls, which are not measured
# again. DEVICE=cpu rehearses the run. A CUDA build of torch is needed, and no package registry: `make prebuilt` makes,
# on any machine, what would otherwise be compiled or downloaded there. Copy its folder prebuilt/ along with the tree.
# Without that folder the run builds for itself and says what it cost.
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
