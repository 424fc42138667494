# fastkd: `make demo` and `make test` set everything up by themselves. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The torch of development and CI, pinned here and nowhere else. The library itself runs on any torch >= 2.10.
TORCH ?= torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES = $(shell find $(1) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CSRC := $(call SOURCES,csrc)
FORMATTED := $(CSRC) $(call SOURCES,tests/emulated)
SANITIZED := build/sanitized
PARALLEL := -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-full gpu-check sanitize inspect lint format wheel build clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.tools: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" wheel pybind11 ninja
	touch $@

$(VENV)/.built: $(VENV)/.tools setup.py $(CSRC)
	$(PIP) --no-build-isolation --editable ".[cli,test]"
	touch $@

$(VENV)/.dev: $(VENV)/.built
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

build: $(VENV)/.built  ## set up the environment and compile, after each change of csrc/

demo: $(VENV)/.built  ## distil a teacher on real data: a table, and a figure beside it
	$(BIN)/fastkd demo

test: $(VENV)/.built  ## all tests
	$(BIN)/pytest $(PARALLEL)

lint: $(VENV)/.dev  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: $(VENV)/.dev  ## put every file into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

sanitize: $(VENV)/.built  ## the op tests under AddressSanitizer and UndefinedBehaviorSanitizer
	FASTKD_SANITIZE=1 FASTKD_CUDA=0 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$$(echo $(SANITIZED)/lib*)" FASTKD_SCHEDULES=1 $(BIN)/pytest $(PARALLEL) -m "not compiles and not forks and not no_kernels"

inspect: $(VENV)/.dev  ## the CUDA kernels as nvcc built them: registers, spills, wide loads and stores
	$(BIN)/python .ci/inspect_cuda.py

$(VENV)/.bench: $(VENV)/.built
	$(PIP) --no-build-isolation --editable ".[bench]"
	touch $@

bench: $(VENV)/.bench  ## fastkd and its peers on this machine: table, JSON and figures in benchmarks/results/; 5 minutes
	$(BIN)/fastkd bench

bench-full: $(VENV)/.bench  ## the same over sweeps of sizes and threads; half an hour
	$(BIN)/fastkd bench --full

gpu-check:  ## on a machine with a GPU: build, test, sanitize, measure, with $(PYTHON) as it is, in 8 minutes
	$(PYTHON) -m benchmarks.gpu_check

wheel: $(VENV)/.tools  ## dist/fastkd-*.whl, for any torch >= 2.10
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## all that was built, the environment included
	rm -rf build dist $(VENV) fastkd/*.so *.egg-info
