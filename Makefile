# Every target works from a clean checkout with Python 3.11 or later, pip and make; a C++ compiler makes it faster.
#
#   make demo        train a sequence of tasks on real households' behavior, print the R matrix, draw plots
#   make test        all tests
#   make asan        the kernels' tests on a build with the address and undefined behavior sanitizers (needs gcc)
#   make bench       ours beside the eager reference and torch.compile of it (BENCH=--quick for a smoke run)
#   make bench-scaling   how the cost of ours grows with length, batch and number of past tasks (BENCH=--quick)
#   make bench-large   heads over hundreds of thousands of labels, beside PyTorch's (BENCH=--quick)
#   make bench-methods   training steps of the other methods beside their eager forms (BENCH=--quick)
#   make bench-gpu   on a GPU: equivalence tests, then ours beside eager and the device's own limits (BENCH=--quick)
#   make tune        on a GPU: measure launch configurations, rewrite its row of kernels/configs.json (TUNE="--operation conv")
#   make lint        ruff      make typecheck   mypy      make clean   remove what was built here
#
# PYTHON  interpreter that .venv is made with (python3)
# VENV    environment to install into (.venv); an active one: make test VENV=$VIRTUAL_ENV
# TORCH   what to give `pip install` when the environment has no torch. By default the CPU build of TORCH_VERSION, from where
#         pip looks or else from PyTorch's own index. For CUDA: make bench-gpu TORCH=torch, in an environment that has none

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BENCH ?=
TUNE ?=
PYTEST_ARGS ?=
# As many processes as cores; a file's tests stay together, since they share what takes long to make.
PARALLEL ?= --numprocesses auto --dist loadfile

BIN := $(VENV)/bin
# Byte code is made at first import instead of for everything at once: a third of the time of an install.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
# A change of any of these installs again; Python files need no installing, the package is editable.
BUILT_FROM := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

.PHONY: help demo test asan bench bench-scaling bench-large bench-methods bench-gpu tune lint typecheck clean

help:
	@sed -n '3,18s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

# Python is not built with the sanitizers, so their libraries are loaded before it; so is libstdc++, whose exceptions they
# watch. A finding ends the process, and with it what pytest has captured: so pytest captures only what Python prints.
# The peak of hardly optimized code is no peak. Of the instruction sets the best and AVX2, whose tiles differ most, are enough here.
ASAN_PRELOAD = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))
asan: export ASAN_OPTIONS = detect_leaks=0
asan: export UBSAN_OPTIONS = halt_on_error=1:print_stacktrace=1
asan: export OMP_NUM_THREADS = 2
asan: export TERACON_BUILD_EXT = 1
asan: $(VENV)/.installed-dev
	TERACON_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/asan --build-temp build/asan/objects
	LD_PRELOAD="$(ASAN_PRELOAD)" TERACON_NATIVE_LIBRARY=$(CURDIR)/build/asan/teracon_fast/_C.so \
	  $(BIN)/python -m pytest tests/ops/test_masked_conv.py tests/ops/test_linear_cross_entropy.py \
	  tests/ops/test_retention_mse.py tests/ops/test_linear_rank.py tests/model/test_encoder.py \
	  tests/packing/test_packing.py tests/packing/test_native_packing.py tests/ops/test_native.py tests/optim/test_optim.py \
	  tests/optim/test_lazy_rows.py \
	  $(PARALLEL) --threads 2 --timeout 1200 --capture sys -k "not matrix_product and not gradcheck and not opcheck and not compiles and not 32_bits and not torch \
	  and not generic and not avx512]" $(PYTEST_ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest bench/ $(BENCH)

bench-scaling: $(VENV)/.installed-dev
	$(BIN)/python -m bench.scaling $(BENCH)

bench-large: $(VENV)/.installed-dev
	$(BIN)/python -m bench.heads $(BENCH)

bench-methods: $(VENV)/.installed-dev
	$(BIN)/python -m bench.methods $(BENCH)

# The tests are run by the script, which keeps what they say beside the figures, and refuses at once where there is no GPU.
bench-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m bench.gpu $(BENCH)

tune: $(VENV)/.installed-dev
	$(BIN)/python -m bench.tune $(TUNE)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .

typecheck: $(VENV)/.installed-dev
	$(BIN)/python -m mypy

clean:
	rm -rf build dist *.egg-info teracon_fast/_C.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.installed-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Debian's python3 has no ensurepip without its python3-venv package: then the pip outside fills the environment.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, got " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
	if test -n "$(TORCH)"; then $(INSTALL) numpy $(TORCH); else \
	  $(INSTALL) numpy "torch==$(TORCH_VERSION)+cpu" || \
	  $(INSTALL) numpy "torch==$(TORCH_VERSION)+cpu" --extra-index-url $(TORCH_INDEX) || \
	  $(INSTALL) numpy "torch==$(TORCH_VERSION)"; \
	fi
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__, "from", torch.__path__[0])'
	@touch $@

# Without build isolation: the extension is built against the torch of this environment, and no other one is downloaded.
$(VENV)/.installed-%: $(VENV)/.torch $(BUILT_FROM)
	$(INSTALL) --quiet 'setuptools>=77'
	$(INSTALL) --quiet --no-build-isolation -e '.[$*]'
	@$(BIN)/python -c 'from teracon_fast.ops import native as n; print("compiled extension:", n.missing_reason() or "built")'
	@touch $@
