# ernie-gguf: build the patched llama.cpp, install the project, show it, test it.
# Everything made lies in $(BUILD_DIR) and $(VENV); a second run repeats no step that is up to date.

PYTHON             ?= python3
VENV               ?= .venv
BUILD_DIR          ?= build
LLAMA_CPP_SRC      ?=
JOBS               ?= $(shell nproc)
CUDA_ARCHITECTURES ?= 80;86;89;90
LLAMA_CMAKE_ARGS   ?=
# What `make test` installs beside the package: dev; reference and paddle for the comparisons with transformers and paddle.
EXTRAS             ?= dev

TREE  := $(BUILD_DIR)/llama.cpp
CPU   := $(BUILD_DIR)/cpu
CUDA  := $(BUILD_DIR)/cuda
DEMO  := $(BUILD_DIR)/demo
BIN   := $(VENV)/bin
LIB   := bindings/ernie_llama/lib
SEARCH := $(BUILD_DIR)/search/libccq_search.so
SEARCH_LIB := convert/ernie_gguf/ccq2/lib

TOOLS := llama-server llama-cli llama-completion llama-bench llama-perplexity llama-quantize llama-imatrix \
         llama-tokenize llama-gguf-split ggml-rpc-server test-backend-ops test-quantize-fns
CMAKE := cmake -S $(TREE) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release \
         -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DGGML_RPC=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF

# Build in folder $(1) if it or the tree holds something newer than its last build: llama.cpp's own build always has some
# step to run.
build_newer = if [ ! -e $(1)/.built ] || [ $(1)/build.ninja -nt $(1)/.built ] || \
    [ -n "$$(find $(TREE) -newer $(1)/.built -type f -not -path '*/.git/*' -print -quit)" ]; \
    then cmake --build $(1) -j $(JOBS) --target llama $(TOOLS) && touch $(1)/.built; else echo 'llama.cpp in $(1) is up to date'; fi

# The patched sources that a build follows from.
SERIES := $(wildcard ggml_patch/*.patch) ggml_patch/series ggml_patch/upstream.txt $(shell find ggml_patch/src -type f)
PYTHON_SOURCES := $(shell find convert bindings -name '*.py')
C_SOURCES = $$(find ggml_patch/src -type f) benchmarks/ccq2_kernel.cu convert/ernie_gguf/ccq2/search.cpp
TINY   := $(wildcard examples/ernie-tiny/*)

.DELETE_ON_ERROR:
.PHONY: help demo test quality lint format checkout refresh search quantizer build build-cuda clean require

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

$(VENV)/.extras-$(EXTRAS): $(BIN)/ernie-gguf
	$(BIN)/pip install -q -e '.[$(EXTRAS)]'
	@touch $@

# --- the patched llama.cpp

$(BUILD_DIR)/.patched: $(SERIES) ggml_patch/tree.py | $(BIN)/ernie-gguf
	@mkdir -p $(BUILD_DIR)
	$(BIN)/python ggml_patch/tree.py checkout --tree $(TREE) --cache $(BUILD_DIR) $(if $(LLAMA_CPP_SRC),--source $(LLAMA_CPP_SRC))
	@touch $@

checkout: $(BUILD_DIR)/.patched ## make the llama.cpp tree in BUILD_DIR: upstream, our new files, the patch series

refresh: | $(BIN)/ernie-gguf ## re-export the series after edits in the tree (one commit per patch)
	$(BIN)/python ggml_patch/tree.py refresh --tree $(TREE) --cache $(BUILD_DIR)
	@touch $(BUILD_DIR)/.patched

$(CPU)/build.ninja: $(BUILD_DIR)/.patched Makefile
	$(CMAKE) -B $(CPU) $(LLAMA_CMAKE_ARGS) > $(BUILD_DIR)/cmake-cpu.log 2>&1 || { cat $(BUILD_DIR)/cmake-cpu.log; exit 1; }
	@touch $@

$(SEARCH): convert/ernie_gguf/ccq2/search.cpp
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O3 -march=native -fno-math-errno -Wall -Wextra -shared -fPIC -o $@ $<

# The link belongs to one BUILD_DIR, as that of the bindings does.
search: $(SEARCH)
	@ln -sfn $(abspath $(dir $(SEARCH))) $(SEARCH_LIB)

quantizer: $(VENV)/.extras-quantize search ## install what `ernie-gguf quantize` needs (torch), compile its search

build: $(CPU)/build.ninja search ## build llama.cpp with ccq2 for the CPU
	@$(call build_newer,$(CPU))
	@ln -sfn $(abspath $(CPU))/bin $(LIB)

$(CUDA)/build.ninja: $(BUILD_DIR)/.patched Makefile
	$(CMAKE) -B $(CUDA) -DGGML_CUDA=ON '-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)' $(LLAMA_CMAKE_ARGS) \
	    > $(BUILD_DIR)/cmake-cuda.log 2>&1 || { cat $(BUILD_DIR)/cmake-cuda.log; exit 1; }
	@touch $@

build-cuda: $(CUDA)/build.ninja ## build it for NVIDIA GPUs (CUDA_ARCHITECTURES)
	@$(call build_newer,$(CUDA))
	@ln -sfn $(abspath $(CUDA))/bin $(LIB)

# --- using it

$(DEMO)/ernie-tiny-%.gguf: $(TINY) $(PYTHON_SOURCES) | $(BIN)/ernie-gguf
	@mkdir -p $(DEMO)
	$(BIN)/ernie-gguf convert examples/ernie-tiny --outfile $@ --outtype $* --overwrite

demo: build $(DEMO)/ernie-tiny-bf16.gguf $(DEMO)/ernie-tiny-ccq2.gguf ## convert the example checkpoint to BF16 and ccq2, and let both write
	$(BIN)/python examples/demo.py $(DEMO)/ernie-tiny-bf16.gguf $(DEMO)/ernie-tiny-ccq2.gguf

test: $(VENV)/.extras-$(EXTRAS) build ## run every test (installs and builds what it needs)
	LLAMA_CPP_BIN=$(abspath $(CPU))/bin LLAMA_CPP_TREE=$(abspath $(TREE)) $(BIN)/pytest

quality: build quantizer ## measure ccq2, plain and calibrated, beside llama.cpp's types on examples/ernie-tiny
	$(BIN)/python benchmarks/quality.py examples/ernie-tiny --calibration convert --evaluate tests \
	    --evaluate-bytes 150000 --llama-cpp $(CPU)/bin

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
