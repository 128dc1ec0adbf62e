# Two commands: `make quickstart` and `make test`. Each needs Python 3.11 or newer and make, nothing else.
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= quickstart
OF_FOLDERS := evaluation eval_throughput homography lightglue_disk reconstruction registration  # of images of one's own
BENCHMARKS := $(filter-out benchmarks/side_by_side.py $(OF_FOLDERS:%=benchmarks/%.py),$(wildcard benchmarks/*.py))

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/.package
	$(BIN)/gim-jax quickstart --out $(OUT) $(VIDEOS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.test
	failed=; for file in $(BENCHMARKS); do echo $$file; $(BIN)/python $$file || failed="$$failed $$file"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps vismatch==1.4.0 imcui==0.1.3  # DKM; hloc: they name 70 more
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
