# Every command sets up .venv by itself. `make help` lists them.

# The Python that .venv is made of, 3.11 or newer.
PYTHON ?= python3
# What pip is asked for as torch: the pinned one, another version, or the path of a wheel.
TORCH ?= $(PINNED_TORCH)
# Where torch alone comes from, e.g. https://download.pytorch.org/whl/cpu; empty: where everything else comes from.
TORCH_INDEX ?=
# Handed on to the command, e.g. make train ARGS="--rl.steps=10" or make test ARGS="-k countdown".
ARGS ?=
# Training processes: above 1 through torchrun.
NPROC ?= 1
# Test processes side by side, one thread each.
JOBS ?= 2

# One line says so where a tool is missing, and the reference ops are used; where our sources do not compile, it fails.
BUILD_NATIVE = echo 'building the native kernels' && $(BIN)/python setup.py -q build_ext --inplace && $(LIBRARIES) > .venv/.native
# The stamp lists what was built; a library that is gone makes it old.
LIBRARIES := echo kernels/_native_*.so

PINNED_TORCH := $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help train test test-long native sanitize fuzz bench lint clean always
.DEFAULT_GOAL := help

help:
	@echo 'make train      the default run: a tiny MoE learns to think (see README)'
	@echo 'make test       the tests, minutes on 2 cores'
	@echo 'make test-long  the long tests, and make sanitize'
	@echo 'make native     build the kernels of csrc/, or say what is missing; the others do it where sources changed'
	@echo 'make sanitize   the kernels under the address and undefined-behaviour sanitizers'
	@echo 'make fuzz       ten minutes of grading nonsense: no verifier may crash, hang or leak'
	@echo 'make bench      every op beside torch and installed peers: at small shapes on a CPU, at large ones on a GPU'
	@echo 'make lint       ruff and mypy'
	@echo 'make clean      remove .venv, caches and build products; runs/ stays'
	@echo
	@echo 'Variables: ARGS="--rl.steps=10"  PYTHON=python3.12  NPROC=2  JOBS=4'
	@echo '           TORCH=torch==2.11.0  TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	@echo "           (export TORCH and TORCH_INDEX to keep them from one make to the next)"

# One process needs no launcher, and Ctrl-C then reaches it alone: torchrun would end in a traceback of its own.
train: .venv/.ready .venv/.native
ifeq ($(NPROC),1)
	@$(BIN)/python train.py $(ARGS)
else
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train.py $(ARGS)
endif

test: .venv/.ready .venv/.native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not long and not gpu" $(ARGS)

test-long: .venv/.ready .venv/.native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "long and not gpu" $(ARGS)
	@JOBS=$(JOBS) .ci/sanitize

native: .venv/.tools
	@$(BUILD_NATIVE)

sanitize: .venv/.ready
	@JOBS=$(JOBS) .ci/sanitize

fuzz: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reason_rl.reward.fuzz $(ARGS)

bench: .venv/.ready .venv/.native
	@$(BIN)/python -m bench $(ARGS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python .ci/lint_tree.py

clean:
	rm -rf .venv build dist *.egg-info kernels/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/.wanted changes only when TORCH or TORCH_INDEX does, and then torch is installed anew.
.venv/.wanted: always
	@mkdir -p .venv
	@echo '$(TORCH) $(TORCH_INDEX)' | cmp -s - $@ || echo '$(TORCH) $(TORCH_INDEX)' > $@

$(BIN)/pip: | .venv/.wanted
	@command -v $(PYTHON) > /dev/null || { echo 'No $(PYTHON) here: install Python 3.11 or newer, or name one with PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "reason_rl needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) -V 2>&1`. Name another with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null \
	  || { echo '$(PYTHON) has no venv or no ensurepip: on Debian and Ubuntu, apt-get install python3-venv'; exit 1; }
	@echo 'making .venv'
	@$(PYTHON) -m venv .venv

.venv/.torch: .venv/.wanted $(BIN)/pip
	@echo 'installing $(TORCH)'
	@if [ '$(TORCH)' = '$(PINNED_TORCH)' ]; then cp constraints.txt .venv/pins.txt; else sed '/^# torch,/,$$d' constraints.txt > .venv/pins.txt; fi
	@$(PIP) install -c .venv/pins.txt 'setuptools>=77'
	@$(PIP) install --no-deps --force-reinstall $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	@touch $@

.venv/.tools: .venv/.torch constraints.txt
	@$(PIP) install -c .venv/pins.txt cmake ninja
	@touch $@

# Again when csrc/ (its folders too: a file may go) or its build changes, or the libraries are not those that were built.
.venv/.native: .venv/.tools setup.py CMakeLists.txt $(shell find csrc) $(shell $(LIBRARIES) | cmp -s - .venv/.native || echo always)
	@$(BUILD_NATIVE)

# The kernels first: pip would build them without a word.
.venv/.ready: .venv/.torch pyproject.toml setup.py constraints.txt | .venv/.native
	@echo 'installing the rest'
	@$(PIP) install -c .venv/pins.txt --no-build-isolation -e '.[dev,bench]'
	@touch $@
