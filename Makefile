# What this needs: Python 3.11 and make. Everything else goes into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test demo bench format clean
.DELETE_ON_ERROR:

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: $(VENV)/ready  ## formatting, lint, strict types, all tests and docs examples, the wheel outside the checkout
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q
	$(BIN)/python -m build --quiet --wheel --outdir $(VENV)/wheel .
	sh tests/try_wheel.sh $(BIN)/python $(VENV)/wheel

demo: $(VENV)/ready  ## FedPara, dense and low-rank on real images, through the commands a user types
	$(BIN)/python demo/run.py

bench: $(VENV)/ready  ## the numbers of the README, written to benchmarks/results.md
	$(BIN)/python benchmarks/run.py

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist demo-run *.egg-info
