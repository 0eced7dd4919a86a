# Everything a newcomer runs. Each target makes the environment it needs; none needs another one run first.
#
#   make demo     compress a small trained network and show the report
#   make test     the tests
#   make help     the rest
#
# PYTHON=python3.12 chooses the interpreter, VENV=/tmp/env the place of the environment, JOBS=4 how many
# tests run at a time; ARGS goes to the demo, PYTEST_ARGS to pytest.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
PYTEST_ARGS ?=

BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
KERNELS = $(wildcard src/tensortrain/system/native/*.h src/tensortrain/system/native/*.cpp)
# Tests run side by side, one thread each: more threads than cores make all of them slower.
# Each takes a part in order, and from the other where it is done: what a file sets up is set up once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint check docs-check format data env dev-env clean distclean

help:
	@echo "make demo        compress a small trained network and show the report"
	@echo "make test        run the tests"
	@echo "make check       lint, types, import rule, tests: what CI runs"
	@echo "make lint        the same without the tests"
	@echo "make docs-check  run the code in README.md and docs/"
	@echo "make format      put the code into shape"
	@echo "make data        fetch Fashion-MNIST, the movie snippets, the spoken prompts (about 90 MB)"
	@echo "make env         only the environment of the package; make dev-env: with the tools"
	@echo "make clean       remove caches and build outputs; make distclean: the environment too"

demo: env
	$(BIN)/tensortrain demo $(ARGS)
	@cat $(VENV)/.seconds 2>/dev/null || true

test: dev-env
	$(PYTEST)

check: lint test

lint: dev-env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tensortrain
	$(BIN)/lint-imports

docs-check: dev-env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_readme.py

format: dev-env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: env
	$(BIN)/python -c "from tensortrain import data; print('Fashion-MNIST:', data.fashion_mnist().source)"
	$(BIN)/python -c "from tensortrain import data; print('movie snippets:', data.movie_snippets().source)"
	$(BIN)/python -c "from tensortrain import data; print('spoken prompts:', data.spoken_prompts().source)"

# The stamps lie inside the environment: removing it removes them, and they are older than
# pyproject.toml or constraints.txt exactly when the requirements may have changed.
env: $(VENV)/.runtime-installed $(VENV)/.kernels-built

dev-env: $(VENV)/.dev-installed $(VENV)/.kernels-built

$(VENV)/.runtime-installed: pyproject.toml constraints.txt | $(VENV)/.made
	@date +%s > $(VENV)/.began
	$(INSTALL) -e ".[kernels]"
	@echo "seconds: environment, with its downloads $$(( $$(date +%s) - $$(cat $(VENV)/.began) ))" > $(VENV)/.seconds
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/.made
	$(INSTALL) -e ".[dev]"
	@touch $(VENV)/.runtime-installed $@

# Everything works without kernels, so a machine that cannot compile them is no reason to stop.
$(VENV)/.kernels-built: $(KERNELS) | $(VENV)/.runtime-installed
	@echo "Compiling the kernels: about a minute, once."
	@date +%s > $(VENV)/.began
	@$(BIN)/tensortrain build-kernels && touch $@ || echo "Going on without kernels: small layers run slower."
	@echo "seconds: kernels $$(( $$(date +%s) - $$(cat $(VENV)/.began) ))" >> $(VENV)/.seconds

$(VENV)/.made:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || { \
	  echo "tensortrain needs Python 3.10 or later: '$(PYTHON)' is missing or older." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || { \
	  echo "tensortrain needs Python's venv module: '$(PYTHON)' has none." \
	       "Install it (Debian, Ubuntu: apt install python3-venv), or name another Python:" \
	       "make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making the environment $(VENV) and installing PyTorch: a minute or two, once."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf "$(VENV)"
