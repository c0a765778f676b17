PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: install demo test check bench docs docs-site format clean

install: $(STAMP)

# torch goes first and pinned: a looser request would fetch another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/pcscale demo

test: install
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/file_sizes.py
	$(BIN)/python tools/docs.py --check
	$(SITE) --quiet --site-dir .cache/site

docs: install
	$(BIN)/python tools/docs.py

docs-site: install
	$(SITE)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .cache site
