PYTHON ?= python3
# Pinned, because another torch may bring gigabytes of CUDA libraries with it.
TORCH ?= torch==2.13.0
# That torch's, for the tests of timm.
TORCHVISION ?= torchvision==0.28.0
ARGS ?=
# What tests draw from; nothing: another seed in every run, which the tests' first line tells.
SEED ?= 0
# How many calls `make fuzz` makes.
EXAMPLES ?= 100000
# Of each test that runs in a GPU's place or under sanitizers so many cases are drawn; none: all run.
CASES ?= 6
# Processes that share the tests of the CPU.
WORKERS ?= 2
OUT ?= build/gpu_check

# Packages are unpacked while the kernels compile.
ifeq ($(MAKECMDGOALS),demo)
MAKEFLAGS += -j2
endif
# With -j, Ninja would ask make for its turn, through files that are not handed down to it.
unexport MAKEFLAGS

BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
CSRC := $(shell find csrc -type f -not -name '*.pyc')
FORMATTED := $(filter %.cpp %.h %.cu,$(CSRC) $(wildcard tests/cuda_on_host/* tests/cpu_helpers/*))
NO_KERNELS := $(patsubst %,--ignore tests/test_%.py,packaging nvcc import info benchmarks \
    benchmarks_command benchmarks_cuda benchmarks_liger benchmarks_processes benchmarks_pytest \
    benchmarks_records train_step examples examples_compare examples_data examples_llm \
    examples_llm_text cuda_check cuda_check_row_path gpu_check)
CUDA := build/cuda/nvidia/cu13
CUDA_PACKAGES := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl
TIMM := build/timm
TIMM_TESTS := tests/test_peers_integrations_timm.py \
    'tests/test_peers_integrations_examples.py::test_docstring[timm]'
NOT_TIMM := $(filter-out $(TIMM_TESTS),$(wildcard tests/test_peers_*.py)) \
    $(patsubst %,--deselect=%,$(filter-out %.py,$(TIMM_TESTS)))
# The sanitizers must be in the process before Python is, whose own allocations leak by design.
SANITIZED = FASTKD_TEST_CASES=$(CASES) LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
FUZZ_TESTS := $(wildcard tests/test_fuzz*.py)
# What reaches every address that a CPU kernel may, and every branch of one.
SANITIZED_TESTS := $(FUZZ_TESTS) $(patsubst %,tests/test_%.py,attention autograd distillation \
    divergence divergence_edges extreme_logits fsp hint inplace isa linear_head mask metrics \
    metrics_edges num_classes probabilities ranks ranks_calls ranks_linear_head ranks_top_k rkd \
    row_weight similarity soft_target soft_target_teachers softcap temperatures top_k \
    top_k_arguments top_k_edges weighted_gradients)
# $(call cmake,source folder,build folder,options) compiles what only tests use.
cmake = PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S $(1) -B $(2) -G Ninja $(3) \
    -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" && $(BIN)/cmake --build $(2)
# $(call kernels,folder,options) compiles the CPU kernels beside those in use.
kernels = FASTKD_BUILD=cpu CMAKE_ARGS="$(2)" $(BIN)/python setup.py -q build_ext \
    --build-temp $(1) --build-lib $(1)
kernels_in = FASTKD_TEST_BACKENDS=native FASTKD_TEST_THRESHOLDS=lowered \
    FASTKD_NATIVE_PATH="$$(ls $(1)/fastkd/_native*.so)"
# $(call on_host,folder,options) compiles the CUDA kernels for the CPU.
on_host = $(call cmake,tests/cuda_on_host,$(1),$(2))
# Of the shim itself.
SHIM_TESTS := $(wildcard tests/test_cuda_on_host*.py)
NOT_SHIM := $(SHIM_TESTS:%=--ignore %)
# What `make test-all` compiles more for.
NOT_BRIEF := $(NOT_SHIM) --ignore tests/test_cpu_helpers.py
# What is about the CPU kernels, which that module has not.
NOT_CUDA := $(patsubst %,--ignore tests/test_%.py,isa cpu_helpers thresholds large_gradients groups)
# $(call test_on_host,folder,tests) runs them.
test_on_host = PYTHONPATH=tests FASTKD_TEST_BACKENDS=native FASTKD_TEST_CASES=$(CASES) \
    FASTKD_NATIVE_PATH="$$(ls $(1)/_native*.so)" \
    $(BIN)/pytest -p cuda_on_host.plugin tests $(NOT_CUDA) -k $(2)
# What the tests of losses that have CUDA and Triton kernels are known by.
FUSED := hint or soft_target or distillation or divergence or mask or normalizer \
    or row_weight or weighted or num_classes or inplace or temperature or probabilities or ranks \
    or linear_head or softcap or top_k or extreme or metrics or attention or rkd or similarity \
    or relation or fsp
# Those of them that reach every address a CUDA kernel may, within minutes under ASan.
ADDRESSES := (hint or regimes or distillation or metrics) and not (compile or large_rows or bitwise)
# What is about other backends; memory, of which the interpreter keeps its own; and rows of a whole
# vocabulary, which take the interpreter 15 seconds a case. torch.compile is left out because it calls
# the same kernels; there it takes minutes.
NOT_TRITON := $(NOT_SHIM) \
    $(patsubst %,--ignore tests/test_%.py,soft_target_regimes soft_target_few_regimes \
    soft_target_columns_regimes attention_regimes isa vocabulary schedules groups \
    linear_head_memory)

# Tests run beside others: a thread that waits for work must not keep them from a core.
test test-% sanitize-% fuzz crashes coverage: export OMP_WAIT_POLICY = passive
test test-% sanitize-%: export FASTKD_TEST_SEED = $(SEED)

help:  ## Say what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20
	@echo
	@echo 'All but gpu-check make .venv first. ARGS="..." goes to demo, compare, llm, test, cuda-check, bench;'
	@echo 'PYTHON and TORCH choose what .venv is made of ($(PYTHON), $(TORCH)).'

# The tests run the demo and the benchmarks, too.
test test-cpu test-triton test-cuda fuzz crashes coverage cuda-check sanitize-cpu sanitize-fuzz \
    sanitize-cuda: .venv/with-demo,bench,test

demo: .venv/native .venv/with-demo  ## Distil on the handwritten digits (ARGS="--help" lists the choices)
	$(BIN)/python examples/distill.py $(ARGS)

compare: .venv/native .venv/with-demo  ## Compare six methods of distillation (ARGS="--help" lists the choices)
	$(BIN)/python examples/compare.py $(ARGS)

llm: .venv/native .venv/with-demo  ## Distil a language model (ARGS="--help" lists the choices)
	$(BIN)/python examples/llm.py $(ARGS)

# At most so many cases of each test, and calls of the fuzz test.
test: .venv/native  ## Run the tests of the losses on the CPU (2 to 4 minutes; ARGS="-k hint" chooses)
	FASTKD_TEST_CASES=12 FASTKD_TEST_EXAMPLES=200 $(BIN)/pytest -n $(WORKERS) --dist worksteal \
	    -m 'not thorough' $(NOT_BRIEF) tests $(ARGS)

# With ARGS, which may name files or tests, the GPU's kernels are left to targets of their own.
test-all: test-cpu $(if $(ARGS),,test-triton test-cuda)  ## Run every test, also of the GPU's kernels

test-cpu: .venv/native cuda-on-host cpu-helpers  ## Run every test of the CPU and of the tools
	$(BIN)/pytest -n $(WORKERS) --dist loadscope tests $(ARGS)

# torchdistill asks for torchvision, whose wheel fits one build of torch alone; beside another one not
# even transformers can be imported. torchdistill's losses do without. timm does not: both have a
# folder of their own. Of Model-Optimizer two files are read.
test-peers: .venv/native .venv/with-test,peers $(TIMM)/timm  ## Compare with the libraries of fastkd.compat and .integrations
	$(PIP) --no-deps 'torchdistill>=1.1' 'nvidia-modelopt>=0.47'
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(NOT_TIMM) $(ARGS)
	$(if $(ARGS),,PYTHONPATH=tests:$(TIMM) $(BIN)/pytest -p torchvision_operators $(TIMM_TESTS))

# Pillow is torchvision's. What else they need comes with fastkd[peers].
$(TIMM)/timm: | .venv/installed
	$(PIP) --upgrade --target $(TIMM) --no-deps 'timm>=1.0.31' '$(TORCHVISION)' pillow

cpu-helpers: .venv/installed  ## Compile what is tested of the CPU kernels by itself
	$(call cmake,tests/cpu_helpers,build/cpu_helpers,)

# --hypothesis-seed and the thresholds' seed are the same: the calls are, too.
FUZZ = FASTKD_TEST_EXAMPLES=$(EXAMPLES) FASTKD_TEST_SEED=$(SEED) $(BIN)/pytest $(FUZZ_TESTS) \
    --hypothesis-seed=$(SEED) $(ARGS)

fuzz: .venv/native  ## Call every loss with EXAMPLES random arguments, which SEED decides
	FASTKD_TEST_BACKENDS=native FASTKD_TEST_THRESHOLDS=lowered $(FUZZ)

crashes: .venv/native  ## Compute gradients of up to 32 MB of every pair of dtypes, a process each
	PYTHONPATH=tests $(BIN)/python tests/large_gradients.py --seed $(SEED) $(ARGS)

# What no test reaches must be in tests/unreached.txt, with the reason. For a processor with AVX-512.
coverage: .venv/installed  ## Show which lines and branches of the CPU kernels tests reach
	$(call kernels,build/coverage,-DFASTKD_COVERAGE=ON)
	find build/coverage -name '*.gcda' -delete
	$(call kernels_in,build/coverage) FASTKD_TEST_SEED=$(SEED) $(BIN)/pytest $(SANITIZED_TESTS) \
	    tests/test_thresholds.py tests/test_large_gradients.py --hypothesis-seed=$(SEED) \
	    -k 'not compile and not memory_is and not float64' $(ARGS)
	$(BIN)/python tests/coverage.py build/coverage

test-triton: .venv/native  ## Run Triton's kernels, in its interpreter
	TRITON_INTERPRET=1 FASTKD_TEST_BACKENDS=triton FASTKD_TEST_CASES=$(CASES) \
	    $(BIN)/pytest tests $(NO_KERNELS) $(NOT_TRITON) -k '($(FUSED)) and not compile and not inductor'

test-cuda: .venv/native cuda-on-host  ## Run the CUDA kernels, on the CPU
	$(call test_on_host,build/cuda_on_host,'$(FUSED)')

cuda-on-host: .venv/installed  ## Compile the CUDA kernels for the CPU
	$(call on_host,build/cuda_on_host,)

cuda-check: .venv/native $(CUDA)/bin/nvcc  ## Compile the GPU's kernels and look at the machine code
	CUDA_HOME="$(CURDIR)/$(CUDA)" $(BIN)/python -m tests.cuda_check \
	    $(if $(ARCHITECTURES),--architectures $(ARCHITECTURES)) $(ARGS)
	CUDA_HOME="$(CURDIR)/$(CUDA)" $(BIN)/pytest tests/cuda_check/check_build.py

gpu-check:  ## On a GPU: build, test and measure with PYTHON, into OUT
	$(PYTHON) -m tests.gpu_check --out $(OUT)

lint: .venv/with-bench,lint  ## Check style, types and the figures of the documents
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.readme --check

format: .venv/with-lint  ## Put the sources into the style that lint checks
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED)

bench: .venv/native .venv/with-bench  ## Measure against eager PyTorch and torch.compile
	$(BIN)/python -m benchmarks $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.train_step --small)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.ranks --small)

# Left out: what runs no kernel in this process; torch.compile, which runs the same kernels; memory,
# of which sanitizers take their own; and what varies numbers alone (GPU), or sizes at which only a
# GPU's kernels change (CPU).
sanitize: sanitize-cpu sanitize-cuda  ## Run the kernels' tests under ASan and UBSan

sanitize-cpu: .venv/installed build/sanitize/made
	$(call cmake,tests/cpu_helpers,build/cpu_helpers_sanitized,-DFASTKD_SANITIZE=ON)
	$(SANITIZED) FASTKD_CPU_HELPERS_PATH="$$(ls build/cpu_helpers_sanitized/_cpu_helpers*.so)" \
	    $(BIN)/pytest tests/test_cpu_helpers.py
	$(SANITIZED) $(call kernels_in,build/sanitize) $(BIN)/pytest $(SANITIZED_TESTS) \
	    -k 'not compile and not memory_is' $(ARGS)

sanitize-fuzz: EXAMPLES = 5000
sanitize-fuzz: .venv/installed build/sanitize/made  ## The same of EXAMPLES random arguments (5000)
	$(SANITIZED) FASTKD_TEST_CASES=0 $(call kernels_in,build/sanitize) $(FUZZ)

build/sanitize/made: .venv/installed $(CSRC)
	$(call kernels,build/sanitize,-DFASTKD_SANITIZE=ON)
	@touch $@

sanitize-cuda: .venv/installed
	$(call on_host,build/cuda_on_host_sanitized,-DFASTKD_SANITIZE=ON)
	$(SANITIZED) FASTKD_SHIM_TEST_PATH="$$(ls build/cuda_on_host_sanitized/_shim_test*.so)" \
	    $(BIN)/pytest $(SHIM_TESTS)
	$(SANITIZED) $(call test_on_host,build/cuda_on_host_sanitized,'$(ADDRESSES)') $(NO_KERNELS) \
	    $(NOT_SHIM)

clean:  ## Remove all that make made
	rm -rf .venv build dist demo-output compare-output llm-output *.egg-info .*_cache .hypothesis fastkd/_build.txt
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '_native*.so' -delete

# What the kernels are compiled with, torch not being part of it.
.venv/tools: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' \
	    | xargs $(PIP)
	@touch $@

.venv/installed: .venv/tools
	$(PIP) '$(TORCH)'
	FASTKD_BUILD=none $(PIP) --no-build-isolation --editable .
	@touch $@

# The packages of some extras; fastkd itself stays as it is. Not two of these at a time.
.venv/with-%: .venv/installed
	flock .venv $(PIP) 'fastkd[$*]'
	@touch $@

# For this machine's GPU, or for the CPU alone: kernels for the GPUs of others would take minutes.
.venv/native: .venv/tools $(CSRC)
	$(if $(FASTKD_BUILD)$(FASTKD_CUDA_ARCHS),,FASTKD_CUDA_ARCHS=native )$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(CUDA)/bin/nvcc: | .venv/installed
	$(PIP) --upgrade --target build/cuda \
	    $(CUDA_PACKAGES:%='%==13.0.*')

.PHONY: help demo compare llm test test-all test-cpu test-triton test-cuda test-peers cuda-on-host \
    cpu-helpers cuda-check gpu-check lint format bench fuzz crashes coverage sanitize sanitize-cpu \
    sanitize-cuda sanitize-fuzz clean
