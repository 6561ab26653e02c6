# The verbs of this tree; `make help` lists them.
# They work in the active virtual environment (VIRTUAL_ENV), else in .venv, which the first verb creates.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips at once would disturb each other; Ninja compiles in parallel
.PHONY: help build test test-full test-transformers demo bench bench-full lint cuda-report clean FORCE

PYTHON ?= python3
VENV   ?= $(or $(VIRTUAL_ENV),.venv)
ENV    := $(abspath $(VENV))
PY     := $(ENV)/bin/python

export PATH := $(ENV)/bin:$(PATH)
# First on the path, so that the verbs use this tree also where an installed copy exists.
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))

help:
	@echo "internvl-kernels: prefix-masked, ALiBi-biased attention for PyTorch"
	@echo
	@echo "  make demo       train a small model to read handwritten numbers, then let it read (about 4 minutes)"
	@echo "  make test       build, then run the tests           (make test ARGS='-k layernorm -x')"
	@echo "  make test-full  also the slow sweeps (random cases, 16 lanes on any x86 processor)"
	@echo "  make test-transformers  the model tests under older transformers releases (installed below build/)"
	@echo "  make build      compile the extension in place; does nothing when nothing changed"
	@echo "  make emulator   compile the CUDA kernels for the processor, as make test does"
	@echo "  make bench      build, then measure against SDPA, eager, FlexAttention and the machine (about 12 minutes)"
	@echo "  make bench-full every measurement                   (make bench-full ARGS='-k mpt-30b')"
	@echo "  make cuda-report  registers, spills and hot loops of the compiled CUDA kernels; needs no GPU"
	@echo "  make lint       formatting and code rules"
	@echo "  make clean      remove everything that was built"
	@echo
	@echo "environment     $(ENV)$(if $(VIRTUAL_ENV), (active), (created when missing))"
	@echo "settings        PYTHON=python3.12   the interpreter a new .venv is made with"
	@echo "                INTERNVL_CUDA=0     leave the CUDA kernels out (1: fail when nvcc is missing)"
	@echo "                CMAKE_ARGS=...      passed on to CMake; CMAKE_BUILD_PARALLEL_LEVEL=N limits the compilers"

test: build emulator $(ENV)/.internvl-kernels/test $(ENV)/.internvl-kernels/demo
	@$(PY) -m pytest -m "not slow" $(ARGS)

test-full: build emulator $(ENV)/.internvl-kernels/test $(ENV)/.internvl-kernels/demo
	@$(PY) -m pytest $(ARGS)

test-transformers: build $(ENV)/.internvl-kernels/test
	@$(PY) .ci/transformers.py $(ARGS)

demo: build $(ENV)/.internvl-kernels/demo
	@$(PY) examples/read_digits.py $(ARGS)

bench: build $(ENV)/.internvl-kernels/bench
	@$(PY) -m pytest --benchmark-only -m "not full" bench $(ARGS)

bench-full: build $(ENV)/.internvl-kernels/bench
	@$(PY) -m pytest --benchmark-only bench $(ARGS)

lint: $(ENV)/.internvl-kernels/lint
	@.ci/lint

clean:
	rm -rf build dist python/*.egg-info python/internvl_kernels/*.so tests/emulator/*.so $(ENV)/.internvl-kernels
	rm -rf .pytest_cache .ruff_cache .benchmarks
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# ---- the environment: one stamp per group of requirements, kept in the environment itself ----

$(PY):
	@test "$(ENV)" != "$(VIRTUAL_ENV)" || { echo "VIRTUAL_ENV names $(ENV); no bin/python is there" >&2; exit 1; }
	@echo "creating $(ENV)"
	@$(PYTHON) .ci/environment.py create $(ENV)

$(ENV)/.internvl-kernels/build: GROUPS = build run
$(ENV)/.internvl-kernels/%: GROUPS = $*
$(ENV)/.internvl-kernels/%: pyproject.toml constraints.txt .ci/environment.py | $(PY)
	@$(PY) .ci/environment.py install $(GROUPS)
	@mkdir -p $(@D) && touch $@

# ---- the extension: CMake configures once per change of settings, Ninja knows the rest ----

# -U: settings of an earlier configuration do not linger. What was compiled stays. (Another compiler: make clean first.)
CONFIGURE = cmake -U 'INTERNVL_*' -U '*Python*' -U pybind11_DIR -S . -B build/make -G Ninja \
            -DPython_EXECUTABLE=$(PY) -DCMAKE_BUILD_TYPE=Release $(CMAKE_ARGS)
SETTINGS  = $(PY) $(CMAKE_ARGS) CUDA=$(INTERNVL_CUDA) HEAD_DIMS=$(INTERNVL_HEAD_DIMS)

build: build/make/build.ninja
	@cmake --build build/make
	@test "$$(cat $(ENV)/.internvl-kernels/tree 2>/dev/null)" = "$(CURDIR)" || \
	  { $(PY) .ci/environment.py link && echo "$(CURDIR)" > $(ENV)/.internvl-kernels/tree; }

# The CUDA kernels on the CPU, for the tests.
cuda-report: build
	@$(PY) .ci/cuda_resources.py

emulator: build/make/build.ninja
	@cmake --build build/make --target _emulator

build/make/build.ninja: build/make/settings $(wildcard $(ENV)/pyvenv.cfg) | $(ENV)/.internvl-kernels/build
	@$(CONFIGURE)
	@touch $@

# Rewritten only when it would change.
build/make/settings: FORCE
	@mkdir -p $(@D)
	@echo "$(SETTINGS)" | cmp -s - $@ || echo "$(SETTINGS)" > $@
