# Both commands of the README set up what they need in .venv, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo real test check fast lint types layers wheel docs clean

demo: .venv/ready ## train the tiny agent on this machine's CPU
	$(BIN)/python -m tir_alp.train $(ARGS)

real: .venv/ready-real ## a real language model of 135 M parameters: SFT, ALP, evaluation, on this CPU
	$(BIN)/python -m tir_alp.studies.real $(ARGS)

test: .venv/ready-dev ## run all tests, in up to four processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

check: lint types fast ## what to run before a commit: minutes

fast: .venv/ready-dev ## the tests that take seconds, without processes of a sandbox, servers or a cluster
	$(BIN)/python -m pytest -q -m "not slow and not sandbox" $(FAST) $(ARGS)

lint: .venv/ready-dev layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

layers: .venv/ready-dev ## who may import whom: the contract is in pyproject.toml
	$(BIN)/lint-imports

types: .venv/ready-dev
	$(BIN)/pyright

wheel: .venv/ready-dev ## build a wheel and use it where the checkout is out of sight
	bash tests/end_to_end/wheel.sh

docs: .venv/ready-dev ## the documentation as a site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv build dist site *.egg-info

# Which tests stay together: tests/conftest.py.
PARALLEL := -n auto --maxprocesses 4

FAST := tests/algorithm tests/training tests/rollouts tests/records tests/run tests/report tests/studies \
	tests/test_*.py

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tir_alp needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/ready-real: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	touch $@

# SGLang without a GPU: its own list of dependencies is for CUDA, so ours takes its place.
.venv/ready-sglang: .venv/ready-dev requirements-sglang-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-sglang-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.21
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
