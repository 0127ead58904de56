# Each target sets up .venv by itself when it is missing, or older than pyproject.toml or constraints.txt.
# Another interpreter: make PYTHON=python3.12 demo. A virtual environment that is there already is used as it is.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo test test-slow test-faults lint docs docs-pages bench bench-quick
.NOTPARALLEL:

install: $(READY)-dev

demo: install
	$(BIN)/tailscope demo --out demo

# One thread a process: the workers fill the cores. A file's tests share a worker, and so its expensive fixtures.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# Ten minutes on two cores; its counts go to results/faults.json.
test-faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The pages that are made from the code; a test fails where one is not current.
docs-pages: install
	$(BIN)/python scripts/docs_pages.py

docs: $(READY)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install $(READY)-bench
	$(BIN)/python -m benchmarks

bench-quick: install $(READY)-bench
	$(BIN)/python -m benchmarks --quick

$(READY)-%: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@
