PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# What DeepSpeed compiles lies here, so that it is compiled once.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: install deepspeed-ops demo test check bench docs format clean

install: $(STAMP)

# torch goes first and pinned: a looser request would fetch another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

deepspeed-ops: install
	$(BIN)/python tools/deepspeed_ops.py

demo: install
	$(BIN)/pcscale demo

test: install deepspeed-ops
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/file_sizes.py
	$(BIN)/python tools/docs.py --check

docs: install
	$(BIN)/python tools/docs.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .cache
