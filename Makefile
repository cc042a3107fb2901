# Everything needs Python 3.11 or newer and make, nothing else: each target installs what it uses into .venv first.
# Variables: VENV (.venv), PYTHON (the interpreter that makes it), ARGS (passed to train.py or pytest).

VENV ?= .venv
SUPPORTED := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c "$(SUPPORTED)" 2>/dev/null && { echo $$p; break; }; done)

BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= $(shell for p in python3.12 $(PYTHON); do \
	$$p -c "$(SUPPORTED)" 2>/dev/null && { echo $$p; break; }; done)
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train compare test test-oldest compile-kernels lint format hooks bench bench-gpu constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(VENV)/.train ## train the nano Llama in MXFP4, about 2.5 minutes on two cores (ARGS="trainer.tokens=2e6" adds settings)
	$(BIN)/python train.py +experiment=quartet $(ARGS)

# MXFP4 as Quartet does it, 2 bits by QuEST, and FP4 by the largest value of each tensor, which does not work.
compare: $(VENV)/.train ## train four recipes on the same text and open the page that compares them (about 4.5 minutes on two cores)
	$(BIN)/python train.py -m +experiment=bf16,quartet,quest_2bit,halo_0_fp4 trainer.tokens=524_288 run_root=runs/compare \
		$(ARGS)
	@echo; echo "Validation loss in nats per token; the gap is the loss less that of bf16:"; echo
	@$(BIN)/qtrain compare runs/compare
	@$(BIN)/qtrain report runs/compare --out runs/comparison.html --open

test: $(VENV)/.dev ## run the default test suite (ARGS="-k scale", ARGS="-m slow")
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

# The tests of the kernels and of what stands on them directly.
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,triton gpu kernel_variants gemm reference compiled packing formats \
	policy precision quantizer linear))

test-oldest: $(OLDEST)/.dev ## run the kernels' tests with the oldest torch and triton allowed (installs 5.3 GB)
	$(OLDEST)/bin/python -m pytest $(KERNEL_TESTS) $(ARGS)

compile-kernels: $(VENV)/.dev ## compile every kernel that the tests launch for a GPU, without one (half an hour)
	$(BIN)/python tests/kernel_variants.py $(ARGS)

lint: $(VENV)/.dev ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev ## apply the format and the safe fixes of ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

hooks: $(VENV)/.dev ## run the checks before every commit
	$(BIN)/pre-commit install

RESULTS ?= build/bench
ON_CPU := --device cpu --out $(RESULTS)

bench: $(VENV)/.dev ## time quantisers, linear layers and training on CPU (RESULTS=kernels/bench/results)
	@mkdir -p $(RESULTS)
	$(BIN)/python kernels/bench/bench_kernels.py $(ON_CPU)
	$(BIN)/python kernels/bench/bench_quantize.py $(ON_CPU)
	$(BIN)/python kernels/bench/bench_linear.py $(ON_CPU)
	$(BIN)/python kernels/bench/bench_few_rows.py $(ON_CPU)
	$(BIN)/python kernels/bench/bench_training.py $(ON_CPU)
	$(BIN)/python kernels/bench/bench_training.py $(ON_CPU) --compile 1
	$(BIN)/python kernels/bench/table.py $(RESULTS)/*.json

# On a machine with a GPU nothing is installed: PYTHON, if given, or .venv if there is one, or python3 must have all.
ON_GPU := --device cuda --out $(RESULTS)
GPU_PYTHON = $(or $(if $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(PYTHON),python3)
# Recipes whose models fit into 80 GB beside the one of bf16.
LARGE := --vocabulary 32000 --recipes bf16,quartet,quest --compile 1 --gemm fp8
# A benchmark that fails keeps its rows and stops no other; the target fails in the end.

bench-gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(PYTHONPATH)
bench-gpu: ## the same on a GPU, at the sizes of large models; installs nothing (PYTHON=/path/to/python)
	@mkdir -p $(RESULTS)
	$(GPU_PYTHON) kernels/bench/packages.py
	@failed=0; \
	measure() { echo "kernels/bench/$$*"; $(GPU_PYTHON) kernels/bench/"$$@" $(ON_GPU) || failed=1; }; \
	measure first_contact.py env peaks equal speed gemms few_rows layers training; \
	measure bench_kernels.py --rows 32768 --columns 8192; \
	measure bench_quantize.py --size 8192; \
	measure bench_training.py --model llama_800m --batch 16 $(LARGE); \
	measure bench_training.py --model llama_3200m --layers 4 --batch 32 $(LARGE); \
	$(GPU_PYTHON) kernels/bench/table.py $(RESULTS)/*.json; \
	exit $$failed

# The two stamps are written last, so an interrupted installation is taken up again.
$(VENV)/.train: pyproject.toml constraints.txt
	$(venv)
	@echo "installing qtrain and what training uses into $(VENV), a few minutes: 2.3 GB with torch for CPU, several more with torch for CUDA"
	@$(INSTALL) -e '.[data]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(venv)
	@echo "installing qtrain and what its tests use into $(VENV), a few minutes: 2.8 GB with torch for CPU"
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.train $@

# torch and triton at their lower bounds, all else as it is pinned; in Python 3.12, in which that torch is most in use.
$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	@sed -nE 's/^ *"(torch|triton)>=([0-9.]+).*/\1==\2/p' pyproject.toml > $(OLDEST)/constraints.txt
	@grep -vE '^(torch|triton)==' constraints.txt >> $(OLDEST)/constraints.txt
	@echo "installing the oldest torch and triton into $(OLDEST), several minutes: 5.3 GB with torch for CUDA"
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check --quiet install -c $(OLDEST)/constraints.txt \
		-e '.[data]' hypothesis pytest pytest-timeout
	@touch $@

define venv
@$(or $(PYTHON),false) -c "$(SUPPORTED)" 2>/dev/null || { \
	echo "qtrain needs Python 3.11 or newer with its venv module; found: $$($(or $(PYTHON),python3) --version 2>&1)."; \
	echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; \
	echo "Debian and Ubuntu keep venv in a package of its own: apt install python3-venv"; exit 1; } >&2
@command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || \
	echo "note: no C++ compiler found; qtrain runs all the same, with backend=reference, which is slower" >&2
$(PYTHON) -m venv $(VENV)
endef

# torch stays where it is; triton, because torch for CUDA demands one exact version of it and torch for CPU none.
constraints: ## resolve constraints.txt afresh (torch and triton keep their versions)
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && set -e; \
	grep -E '^(torch|triton)==' constraints.txt > "$$new/keep"; \
	$(PYTHON) -m venv "$$new/venv"; \
	"$$new/venv/bin/pip" install -c "$$new/keep" '.[dev]'; \
	grep '^#' constraints.txt > "$$new/constraints.txt"; \
	PIP_QUIET=0 "$$new/venv/bin/pip" list --format freeze --exclude pip --exclude setuptools --exclude qtrain \
		| grep -vE '^(nvidia|cuda)-' | sed 's/+.*//' | LC_ALL=C sort -f >> "$$new/constraints.txt"; \
	grep -q '^torch==' "$$new/constraints.txt"; \
	cp "$$new/constraints.txt" constraints.txt

clean: ## remove .venv, caches and build products; runs and token shards stay
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
