# make demo   pretrain a small Llama by rotations, with AdamW and with SkewMuon, then by ordinary training (minutes on two cores)
# make test   linters, type checker and tests
#
# Each sets up .venv first. Choices:   make demo PYTHON=python3.12 TORCH=torch==2.12.0 DEMO="--config 60m"
# Another package index for torch:     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu130 make test

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= --compare skewmuon,adamw
TESTS ?=
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/python examples/pretrain.py $(DEMO)

# One thread each: two processes of two threads on two cores wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(TESTS)

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
