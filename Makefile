PYTHON ?= python3
# Pinned, because another torch may bring gigabytes of CUDA libraries with it.
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
CSRC := $(shell find csrc -type f)
UNSANITIZED := packaging import info benchmarks examples

help:  ## Say what there is to make
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo 'The first of them makes .venv. ARGS="..." goes to demo, test and bench;'
	@echo 'PYTHON and TORCH choose what .venv is made of ($(PYTHON), $(TORCH)).'

demo: .venv/native  ## Distil on the handwritten digits (ARGS="--help" lists the choices)
	$(BIN)/python examples/distill.py $(ARGS)

test: .venv/native  ## Run the test suite
	$(BIN)/pytest tests $(ARGS)

lint: .venv/installed  ## Check style, types and the figures of the documents
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.cu %.cuh,$(CSRC))
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.readme --check

format: .venv/installed  ## Put the sources into the style that lint checks
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(CSRC))

bench: .venv/native  ## Measure against eager PyTorch and torch.compile
	$(BIN)/python -m benchmarks $(ARGS)

# The sanitizers must be in the process before Python is, whose own allocations leak by design.
# Left out: what runs no kernel in this process, and torch.compile, which runs the same kernels.
sanitize: .venv/installed  ## Run the kernels' tests under ASan and UBSan
	FASTKD_BUILD=cpu CMAKE_ARGS=-DFASTKD_SANITIZE=ON $(BIN)/python setup.py -q build_ext \
	    --build-temp build/sanitize --build-lib build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    FASTKD_NATIVE_PATH="$$(ls build/sanitize/fastkd/_native*.so)" \
	    $(BIN)/pytest tests -k 'not compile' $(UNSANITIZED:%=--ignore tests/test_%.py) $(ARGS)

clean:  ## Remove all that make made
	rm -rf .venv build dist demo-output *.egg-info .*_cache .hypothesis fastkd/_build.txt
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '_native*.so' -delete

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	FASTKD_BUILD=none $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv/native: .venv/installed $(CSRC)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

.PHONY: help demo test lint format bench sanitize clean
