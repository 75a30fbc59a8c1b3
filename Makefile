# `make demo` and `make test` do all set-up; twice in a row is quick.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
BIN = .venv/bin
READY = .venv/.packages .venv/.extension

# without a GPU nobody runs the CUDA kernels, so they are not compiled
export WARP_FAST_CUDA_ARCHS ?= $(if $(shell command -v nvidia-smi),,none)
# an extension that is gone is built again
ifeq ($(wildcard warp_fast/_C*.so),)
$(shell rm -f .venv/.extension)
endif

.DEFAULT_GOAL = help
.PHONY: help demo test lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' Makefile

demo: $(READY)  ## WARP on a small Gemma beside REINFORCE, 3 minutes on 2 cores
	$(BIN)/python -m warp_fast.demo

test: $(READY)  ## every test that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(READY)  ## ruff and mypy, as in pre-commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the benchmarks, beside their peers; writes bench/results/
	$(BIN)/python -m pytest bench --benchmark-only

clean:  ## remove what was built and installed; runs/ stays
	rm -rf .venv build *.egg-info warp_fast/_C*.so

.venv/.created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.packages: .venv/.created pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[rl,triton,bench,dev]"
	touch $@

.venv/.extension: .venv/.packages setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@
