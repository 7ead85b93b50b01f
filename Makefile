# ernie-gguf: build the patched llama.cpp, install the project, show it, test it.
# Everything made lies in $(BUILD_DIR) and $(VENV); a second run repeats no step that is up to date.

PYTHON             ?= python3
VENV               ?= .venv
BUILD_DIR          ?= build
LLAMA_CPP_SRC      ?=
JOBS               ?= $(shell nproc)
CUDA_ARCHITECTURES ?= every
LLAMA_CMAKE_ARGS   ?=
# What `make test` installs beside the package: dev; reference and paddle for the comparisons with transformers and paddle.
EXTRAS             ?= dev

TREE  := $(BUILD_DIR)/llama.cpp
CPU   := $(BUILD_DIR)/cpu
CUDA  := $(BUILD_DIR)/cuda
VULKAN := $(BUILD_DIR)/vulkan
DEMO  := $(BUILD_DIR)/demo
BIN   := $(VENV)/bin
LIB   := bindings/ernie_llama/lib
SEARCH := $(BUILD_DIR)/search/libccq_search.so
SEARCH_LIB := convert/ernie_gguf/ccq2/lib
SEARCH_SOURCES := convert/ernie_gguf/ccq2/search.cpp convert/ernie_gguf/stock/search.cpp

ENGINE = $(BIN)/ernie-gguf build --folder $(BUILD_DIR) --jobs $(JOBS) $(if $(LLAMA_CPP_SRC),--llama-cpp $(LLAMA_CPP_SRC))

PYTHON_SOURCES := $(shell find convert bindings -name '*.py')
C_SOURCES = $$(find ggml_patch/src -type f ! -name '*.comp' ! -name '*.glsl') benchmarks/ccq2_kernel.cu benchmarks/expert_batches.cpp $(SEARCH_SOURCES)
TINY   := $(wildcard examples/ernie-tiny/*)

.DELETE_ON_ERROR:
.PHONY: help demo test test-arm quality lint format checkout refresh drift search quantizer build build-cuda build-vulkan test-vulkan wheel archives release clean require

help: ## this text
	@echo 'ernie-gguf: ERNIE-4.5 checkpoints in llama.cpp'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) BUILD_DIR=$(BUILD_DIR) JOBS=$(JOBS) EXTRAS=$(EXTRAS)'
	@echo '           LLAMA_CPP_SRC=$(LLAMA_CPP_SRC) (a llama.cpp checkout to use instead of the pinned one)'
	@echo '           CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) LLAMA_CMAKE_ARGS=$(LLAMA_CMAKE_ARGS)'

require:
	@for tool in $(PYTHON) cmake c++; do command -v $$tool >/dev/null || { \
	    echo "error: $$tool is missing; on Debian and Ubuntu: apt-get install python3-venv cmake g++" >&2; exit 1; }; done

# --- the Python environment

$(BIN)/ernie-gguf: pyproject.toml | require
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e . ninja
	@touch $@

$(VENV)/.extras-%: $(BIN)/ernie-gguf
	$(BIN)/pip install -q -e '.[$*]'
	@touch $@

# --- the patched llama.cpp

checkout: | $(BIN)/ernie-gguf ## make the llama.cpp tree in BUILD_DIR: upstream, our new files, the patch series
	$(ENGINE) --sources-only

refresh: | $(BIN)/ernie-gguf ## re-export the series after edits in the tree (one commit per patch)
	$(BIN)/python ggml_patch/tree.py refresh --tree $(TREE) --cache $(BUILD_DIR)

drift: | $(BIN)/ernie-gguf ## tell which patches apply to the newest llama.cpp on PyPI; DRIFT=--build builds and tests it
	$(BIN)/python tools/drift.py --cache $(BUILD_DIR) --jobs $(JOBS) $(DRIFT)

ENCODER := $(wildcard ggml_patch/src/ggml/src/ggml-ccq-*)

$(SEARCH): $(SEARCH_SOURCES) $(ENCODER) convert/ernie_gguf/llama_build/search.py | $(BIN)/ernie-gguf
	$(BIN)/python -m ernie_gguf.llama_build.search $(@D)

# The link belongs to one BUILD_DIR, as that of the bindings does.
search: $(SEARCH)
	@ln -sfn $(abspath $(dir $(SEARCH))) $(SEARCH_LIB)

quantizer: $(VENV)/.extras-quantize search ## install what `ernie-gguf quantize` needs (torch), compile its search

build: search | $(BIN)/ernie-gguf ## build llama.cpp with ccq2 for the CPU
	$(ENGINE) -- $(LLAMA_CMAKE_ARGS)
	@ln -sfn $(abspath $(CPU))/bin $(LIB)

build-cuda: | $(BIN)/ernie-gguf ## build it for NVIDIA GPUs (CUDA_ARCHITECTURES)
	$(ENGINE) --cuda --arch '$(CUDA_ARCHITECTURES)' -- $(LLAMA_CMAKE_ARGS)
	@ln -sfn $(abspath $(CUDA))/bin $(LIB)

build-vulkan: | $(BIN)/ernie-gguf ## build it for GPUs with Vulkan (glslc, libvulkan-dev and spirv-headers needed)
	$(ENGINE) --vulkan -- $(LLAMA_CMAKE_ARGS)
	@ln -sfn $(abspath $(VULKAN))/bin $(LIB)

wheel: $(VENV)/.extras-release ## build the wheel that holds llama.cpp for every x86-64 CPU, in dist/
	$(BIN)/python tools/build_wheel.py --folder $(BUILD_DIR) --jobs $(JOBS)

RELEASE_ENGINE = $(BIN)/ernie-gguf build --folder $(BUILD_DIR)/release --jobs $(JOBS)

archives: wheel ## pack programs and libraries as llama.cpp's releases are, in dist/; for CUDA and Vulkan too if nvcc and glslc are here
	$(BIN)/python tools/build_archive.py cpu=$(BUILD_DIR)/wheel/ernie_llama/lib
	@if command -v nvcc >/dev/null; then \
	    $(RELEASE_ENGINE) --cuda --arch '$(CUDA_ARCHITECTURES)' -- -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON \
	        -DGGML_CPU_ALL_VARIANTS=ON && \
	    $(BIN)/python tools/build_archive.py cuda=$(BUILD_DIR)/release/cuda/bin; \
	else echo 'no nvcc: no archive for CUDA'; fi
	@if command -v $(if $(VULKAN_SDK),$(VULKAN_SDK)/bin/,)glslc >/dev/null; then \
	    $(RELEASE_ENGINE) --vulkan --backend-only -- -DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON && \
	    $(BIN)/python tools/build_archive.py \
	        vulkan=$(BUILD_DIR)/wheel/ernie_llama/lib+$(BUILD_DIR)/release/vulkan/bin/libggml-vulkan.so; \
	else echo 'no glslc: no archive for Vulkan'; fi

release: ## from a clean tree: lint, tests, wheel, sdist, archives, checks; nothing is uploaded
	@test -z "$$(git status --porcelain)" || { echo 'error: the tree has changes; commit them first' >&2; exit 1; }
	rm -rf dist
	$(MAKE) lint test archives
	$(BIN)/python -m build --sdist
	$(BIN)/twine check --strict dist/ernie_gguf-*
	$(PYTHON) tools/check_wheel.py dist/*.whl

# --- using it

$(DEMO)/ernie-tiny-%.gguf: $(TINY) $(PYTHON_SOURCES) | $(BIN)/ernie-gguf
	@mkdir -p $(DEMO)
	$(BIN)/ernie-gguf convert examples/ernie-tiny --outfile $@ --outtype $* --overwrite

$(DEMO)/ernie-vl-tiny-%.gguf: $(wildcard examples/ernie-vl-tiny/*) $(PYTHON_SOURCES) | $(BIN)/ernie-gguf
	@mkdir -p $(DEMO)
	$(BIN)/ernie-gguf convert examples/ernie-vl-tiny --outfile $@ --mmproj $(DEMO)/ernie-vl-tiny-$*.mmproj --outtype $* --overwrite

demo: build $(DEMO)/ernie-vl-tiny-bf16.gguf $(DEMO)/ernie-vl-tiny-ccq2.gguf ## convert an example to BF16 and ccq2, and let both read what is written on images
	$(BIN)/python examples/demo.py $(DEMO)/ernie-vl-tiny-bf16.gguf $(DEMO)/ernie-vl-tiny-ccq2.gguf \
	    examples/ernie-vl-tiny/pictures/1[4-9]-*.png

test: $(VENV)/.extras-$(EXTRAS) build ## run every test (installs and builds what it needs)
	LLAMA_CPP_BIN=$(abspath $(CPU))/bin LLAMA_CPP_TREE=$(abspath $(TREE)) $(BIN)/pytest

test-arm: build $(DEMO)/ernie-tiny-ccq2.gguf ## cross-compile for ARM, test in an emulator (needs g++-aarch64-linux-gnu, qemu-user)
	$(BIN)/python tools/arm.py --tree $(TREE) --folder $(BUILD_DIR)/arm --peer $(CPU)/bin \
	    --model $(DEMO)/ernie-tiny-ccq2.gguf --jobs $(JOBS)

test-vulkan: $(VENV)/.extras-$(EXTRAS) build ## test ccq2 on the first Vulkan device; mesa-vulkan-drivers makes the CPU one
	$(ENGINE) --vulkan --backend-only -- $(LLAMA_CMAKE_ARGS)
	LLAMA_CPP_BIN=$(abspath $(CPU))/bin VULKAN_BACKEND=$(abspath $(VULKAN))/bin/libggml-vulkan.so $(BIN)/pytest tests/vulkan

quality: build quantizer ## measure calibrated types and mixes beside llama.cpp's on examples/ernie-tiny; draw a curve
	$(BIN)/python benchmarks/quality.py examples/ernie-tiny --calibration convert --evaluate tests \
	    --evaluate-bytes 150000 --llama-cpp $(CPU)/bin --plot $(BUILD_DIR)/quality.png

lint: $(VENV)/.extras-$(EXTRAS) ## ruff, mypy --strict, import-linter, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror --style=file:ggml_patch/.clang-format $(C_SOURCES)

format: $(VENV)/.extras-$(EXTRAS) ## rewrite our Python, C and CUDA files in the style that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i --style=file:ggml_patch/.clang-format $(C_SOURCES)

clean: ## remove BUILD_DIR, VENV and the caches
	rm -rf $(BUILD_DIR) $(VENV) $(LIB) $(SEARCH_LIB) .mypy_cache .pytest_cache .ruff_cache .hypothesis
