# make install | demo | test | test-all | lint: each makes .venv when it is missing and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Python keeps the bytecode of what it imports, whatever this machine says: 1.5 s less a process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-all lint clean

install: $(VENV)/installed

# On Linux, XLA's buffers in huge pages: a fifth off the time of a step on a CPU.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(VENV)/installed
	$(BIN)/fmjax finetune --output runs/demo --model minilm --data sentiment/movie --epochs 1
	$(BIN)/fmjax predict runs/demo/export \
		"A quiet film that stays with you for days." \
		"Two hours of my life that I will never get back." \
		"The acting is fine, but the story never finds its feet."

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ""

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# --no-compile: Python compiles what it imports, a small part of what is installed.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --no-compile -e .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --no-compile -e '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --no-compile -e '.[dev]'
	touch $@ $(VENV)/installed-test $(VENV)/installed
