# Both commands do their own set-up: a virtual environment with the tested versions and torch's CPU build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format docs

demo: $(VENV)/ready
	$(BIN)/obsdiff demo demo

# A process a core with one thread each: processes that have two threads on two cores wait for each other.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m "not gpu and not tensorrt"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages in docs/, as a site in site/.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch is named by its exact version with all the rest: any other request resolves to gigabytes of CUDA packages.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e ".[dev,eval]"
	touch $@
