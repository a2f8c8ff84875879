# Every target sets up .venv first. `make help` lists the targets.

# The Python that creates .venv, 3.11 or newer.
PYTHON ?= python3
# pip's requirement for torch: the pinned version, another version, or the path of a wheel.
TORCH ?= $(PINNED_TORCH)
# Package index for torch only, e.g. https://download.pytorch.org/whl/cpu; empty: pip's default index.
TORCH_INDEX ?=
# Arguments of the command, e.g. make train ARGS="--rl.steps=10" or make test ARGS="-k countdown".
ARGS ?=
# Training processes; more than 1 are started by torchrun.
NPROC ?= 1
# Test processes that run in parallel, with one thread each.
JOBS ?= 2

# Without a compiler or a build tool, setup.py prints one line and the reference ops are used. A compile error
# fails.
BUILD_NATIVE = echo 'building the native kernels' && $(BIN)/python setup.py -q build_ext --inplace && $(LIBRARIES) > .venv/.native
# The stamp file lists the libraries that were built; if one is missing, they are built again.
LIBRARIES := echo kernels/_native_*.so

PINNED_TORCH := $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help train test test-long native sanitize fuzz bench lint clean always
.DEFAULT_GOAL := help

help:
	@echo 'make train      the default run, which trains a tiny MoE to think (see README)'
	@echo 'make test       the tests, minutes on 2 cores'
	@echo 'make test-long  the long tests, and make sanitize'
	@echo 'make native     build the kernels of csrc/, or print what is missing; other targets build them after a change'
	@echo 'make sanitize   the kernels' tests under the address and undefined-behaviour sanitizers'
	@echo 'make fuzz       grade random completions for ten minutes: no verifier may crash, hang or leak'
	@echo 'make bench      time every op against torch and installed peers: small shapes on a CPU, also large ones on a GPU'
	@echo 'make lint       ruff, mypy, lines per room, banned phrases'
	@echo 'make clean      remove .venv, caches and build products; runs/ stays'
	@echo
	@echo 'Variables: ARGS="--rl.steps=10"  PYTHON=python3.12  NPROC=2  JOBS=4'
	@echo '           TORCH=torch==2.11.0  TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	@echo "           (export TORCH and TORCH_INDEX, so that every make uses the same torch)"

# One process starts without torchrun, which prints a traceback after Ctrl-C.
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

# .venv/.wanted changes only if TORCH or TORCH_INDEX changes; torch is then reinstalled.
.venv/.wanted: always
	@mkdir -p .venv
	@echo '$(TORCH) $(TORCH_INDEX)' | cmp -s - $@ || echo '$(TORCH) $(TORCH_INDEX)' > $@

$(BIN)/pip: | .venv/.wanted
	@command -v $(PYTHON) > /dev/null || { echo 'No $(PYTHON) here: install Python 3.11 or newer, or name one with PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "reason_rl needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) -V 2>&1`. Name another with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null \
	  || { echo '$(PYTHON) has no venv or no ensurepip: on Debian and Ubuntu, apt-get install python3-venv'; exit 1; }
	@echo 'creating .venv'
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

# Built again after a change of csrc/ (folders are listed too: a file may be deleted) or of its build files,
# or if the libraries differ from the stamp's list.
.venv/.native: .venv/.tools setup.py CMakeLists.txt $(shell find csrc) $(shell $(LIBRARIES) | cmp -s - .venv/.native || echo always)
	@$(BUILD_NATIVE)

# The kernels first: pip would build them and hide the output.
.venv/.ready: .venv/.torch pyproject.toml setup.py constraints.txt | .venv/.native
	@echo 'installing the other packages'
	@$(PIP) install -c .venv/pins.txt --no-build-isolation -e '.[dev,bench]'
	@touch $@
