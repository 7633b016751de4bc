# The two commands of the README (`make demo`, `make test`) need Python 3.11 or newer, pip and make; nothing else.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint lock docs setup clean

demo: setup            ## fine-tune a real network with every method on the embedded images; writes demo/report.html
	$(BIN)/tethertune compare configs/demo.toml --output demo

test: lint             ## lint, types, every test (slow ones too), with coverage
	$(BIN)/python -m pytest --cov --cov-report=term

lint: setup            ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup            ## build the documentation; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

lock: $(BIN)/uv        ## resolve every dependency again, with hashes
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --all-extras --group dev --group docs \
		--custom-compile-command "make lock" -o requirements.lock pyproject.toml

setup: .venv/.installed

$(BIN)/uv:
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(BIN)/python install -q --disable-pip-version-check uv==0.13.8

.venv/.installed: $(BIN)/uv requirements.lock pyproject.toml
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv demo runs docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
