# fastkd: `make demo` and `make test` set everything up by themselves. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The torch of development and CI, pinned here and nowhere else. The library itself runs on any torch >= 2.10.
TORCH ?= torch==2.13.0
# Only errors are shown, as warnings are about pip itself and packages of others; and how far the download of torch is.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
INSTALL := $(PIP) install --no-build-isolation --editable
SOURCES = $(shell find $(1) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CSRC := $(call SOURCES,csrc)
FORMATTED := $(CSRC) $(call SOURCES,tests/emulated tests/fake_cuda)
SANITIZED := build/sanitized
PARALLEL := -n auto --dist worksteal
# Each step says what it does and about how long that takes on two cores, with the packages at hand.
say = @printf '== %s\n'
# What setup.py is told by the environment: other answers build anew.
ASKED = FASTKD_CUDA=$(FASTKD_CUDA) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST) CUDA_HOME=$(CUDA_HOME) CXX=$(CXX)

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-full gpu-check compat frameworks language sanitize inspect machine-code lint format sdist wheel build clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.tools: pyproject.toml Makefile
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  { echo "== making the environment $(VENV): 10 seconds"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c "import torch" 2>/dev/null || \
	  { echo "== installing $(TORCH): half a minute, and its download"; \
	    $(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)" 2>$(VENV)/pip.log || { cat $(VENV)/pip.log; false; }; }
	$(say) "installing what the build needs: 5 seconds"
	@$(PIP) install "setuptools>=77" wheel pybind11 ninja
	@touch $@

$(VENV)/.asked: FORCE
	@mkdir -p $(VENV); echo "$(ASKED)" | cmp --silent - $@ || echo "$(ASKED)" > $@

$(VENV)/.built: $(VENV)/.tools $(VENV)/.asked setup.py $(CSRC)
	$(say) "compiling fastkd, what changed: all of it in a minute, and with CUDA kernels two more for each kind of GPU"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	$(say) "installing what the command line and the tests need: half a minute"
	@$(INSTALL) ".[cli,test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	$(say) "installing the tools of developers: half a minute"
	@$(INSTALL) ".[dev]"
	@touch $@

build: $(VENV)/.built  ## set up the environment and compile, after each change of csrc/

demo: $(VENV)/.built  ## distil a teacher on real data: a table, and a figure beside it
	$(say) "fastkd demo: a minute"
	@$(BIN)/fastkd demo

test: $(VENV)/.built  ## all tests
	$(say) "all tests: minutes; the CUDA kernels are compiled for the CPU first, and pytest shows how far it is"
	@$(BIN)/pytest $(PARALLEL)

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
	$(say) "compiling fastkd for the sanitizers, what changed: all of it in two minutes"
	@FASTKD_SANITIZE=1 FASTKD_CUDA=0 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED)
	$(say) "the op tests: minutes; pytest shows how far it is"
	@LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$$(echo $(SANITIZED)/lib*)" FASTKD_SCHEDULES=1 \
	$(BIN)/pytest $(PARALLEL) -m "not compiles and not forks and not no_kernels"

inspect: $(VENV)/.dev  ## the CUDA kernels as nvcc built them: registers, spills, wide loads and stores, instructions
	$(BIN)/python .ci/inspect_cuda.py

machine-code: $(VENV)/.dev  ## benchmarks/machine_code.md anew, from the CUDA kernels as nvcc built them
	$(BIN)/python .ci/inspect_cuda.py --write-table

$(VENV)/.bench: $(VENV)/.built
	$(say) "installing what the benchmarks compare with: half a minute"
	@$(INSTALL) ".[bench]"
	@touch $@

bench: $(VENV)/.bench  ## fastkd and its peers on this machine: table, JSON and figures in benchmarks/results/; 10 minutes
	$(BIN)/fastkd bench

bench-full: $(VENV)/.bench  ## the same over sweeps of sizes and threads; half an hour
	$(BIN)/fastkd bench --full

gpu-check:  ## on a machine with a GPU: build, test, sanitize, measure, tune, with $(PYTHON) as it is, in 8 minutes; ONLY=failed
	$(PYTHON) -m benchmarks.gpu_check $(if $(ONLY),--only $(ONLY))

$(VENV)/.frameworks: $(VENV)/.built
	$(say) "installing the training frameworks that fastkd is tested with, those of language models too: a minute"
	@$(INSTALL) ".[frameworks,language]" "$$($(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")')"
	@touch $@

frameworks: $(VENV)/.frameworks  ## the training frameworks that some tests need, beside the torch that is there

language: $(VENV)/.frameworks  ## the tests of language models: TRL, transformers, accelerate, Lightning, cached teachers
	$(say) "the tests of language models: two minutes"
	@$(BIN)/pytest $(PARALLEL) tests/language

sdist: $(VENV)/.tools  ## dist/fastkd-*.tar.gz, the sources
	$(say) "packing the sources: 3 seconds"
	@rm -f dist/fastkd-*.tar.gz
	@egg=$$(mktemp -d); $(BIN)/python setup.py --quiet egg_info --egg-base $$egg sdist; status=$$?; rm -rf $$egg; exit $$status

# What pip compiles it does in silence, so all is compiled before; the sources are those of the sdist.
dist/.wheel: $(VENV)/.tools $(VENV)/.asked setup.py README.md LICENSE MANIFEST.in $(CSRC) $(shell find fastkd -name '*.py*' -not -name '*.pyc')
	@$(MAKE) --no-print-directory sdist
	$(say) "compiling fastkd, what changed: all of it in a minute, and with CUDA kernels two more for each kind of GPU"
	@$(BIN)/python setup.py --quiet build_ext
	$(say) "packing the wheel, from the sources that were packed: half a minute"
	@FASTKD_OBJECTS=$(CURDIR)/build/objects $(PIP) wheel --no-deps --wheel-dir dist dist/fastkd-*.tar.gz
	@touch $@

wheel: dist/.wheel  ## dist/fastkd-*.whl, for any torch >= 2.10, with CUDA kernels where nvcc is

compat: wheel  ## dist/fastkd-*.whl beside the oldest, a middle and the newest torch: results/compat/; gigabytes, half an hour
	$(BIN)/python .ci/compat.py

clean:  ## all that was built, the environment included
	rm -rf build dist $(VENV) fastkd/*.so *.egg-info
