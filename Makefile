# Aerie's commands; `make` alone lists them. All need only Python 3.11.
#
#   VENV=path       the environment to make or use            (default .venv)
#   PYTHON=path     the interpreter that environment is made from
#   ARGS="..."      passed on to the command behind the target, for instance
#                   make quickstart ARGS="train.epochs=2"
#   WORKERS=n       processes for the tests that start no Ray (default 2)
#   TORCH_ARGS=".." passed to pip when it installs torch. A machine without a GPU
#                   saves some 5 GB with PyTorch's CPU build: give
#                   --extra-index-url and the address of PyTorch's CPU index, as
#                   on PyTorch's install page.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name))))
VENV ?= .venv
ARGS ?=
TORCH_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --retries 10 --timeout 120
# A file's tests stay in one process, which keeps what they share.
PARALLEL := --numprocesses=$(WORKERS) --dist=loadfile
TORCH := $(shell sed -n '/^torch==/p' requirements.lock)

# A download that breaks off half-way fails pip as a whole, whatever --retries
# says. What arrived is in pip's cache, so that trying again goes on from there.
define retry
for attempt in 1 2 3; do \
    if $(1); then exit 0; fi; \
    echo "aerie: attempt $$attempt of 3 failed"; sleep $$((attempt * 5)); \
done; exit 1
endef

.PHONY: help env install quickstart smoke serve test soak lint check format test-setup lock clean

help: ## list the targets
	@echo "make <target> [VENV=.venv] [PYTHON=python3.11] [ARGS=\"...\"]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

# --- Environment ------------------------------------------------------------

env: $(VENV)/.packages ## the packages of requirements.lock, without Aerie itself

install: $(VENV)/.installed ## make the environment (skipped while nothing changed)

$(VENV)/.packages: requirements.lock
	@[ -n "$(PYTHON)" ] || { echo "aerie: no Python found; install Python 3.11 or give PYTHON=path"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	    { echo "aerie: $(PYTHON) is not Python 3.11 or 3.12; give PYTHON=path"; exit 2; }
	@[ -x "$(BIN)/python" ] && "$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)" || \
	    { echo "aerie: cannot make $(VENV); on Debian and Ubuntu install the package python3-venv"; exit 2; }
	@echo "==> 1/2 $(TORCH) and what it needs"
	@$(call retry,$(PIP) install $(TORCH_ARGS) --constraint requirements.lock "$(TORCH)")
# DeepSpeed comes as source. --use-pep517 builds it apart from the environment,
# where it cannot see torch: it then packs its files and compiles nothing. If it
# saw torch on a GPU machine, it would ask for a CUDA compiler. The two variables
# hold that build's setuptools to the lock too (older and newer pip).
	@echo "==> 2/2 the other packages of requirements.lock"
	@export PIP_CONSTRAINT=requirements.lock PIP_BUILD_CONSTRAINT=requirements.lock; \
	$(call retry,$(PIP) install --no-deps --use-pep517 --requirement requirements.lock)
	@touch $@

$(VENV)/.installed: $(VENV)/.packages pyproject.toml
	@echo "==> Aerie itself, editable"
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# requirements.lock's own comments stay; the rest is what pip resolves for
# pyproject.toml today. ARGS="--constraint requirements.lock" keeps the versions
# there are and only adds or drops packages.
lock: ## resolve pyproject.toml anew into requirements.lock
	rm -rf .lock-venv
	"$(PYTHON)" -m venv .lock-venv
	.lock-venv/bin/python -m pip install --use-pep517 $(TORCH_ARGS) $(ARGS) --editable '.[dev]'
	.lock-venv/bin/python -m pip install --no-deps $(ARGS) $$(.lock-venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["quickstart"])')
	{ sed -n '/^#/p' requirements.lock; \
	  .lock-venv/bin/python -m pip freeze --all --exclude-editable \
	    | grep -vE '^(pip|wheel)==|^(nvidia-|cuda-|triton)' \
	    | sed 's/^\(torch==[^+]*\)+.*/\1/' | sort -f; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .lock-venv

# --- Running ----------------------------------------------------------------

quickstart: install ## the whole path on real conversations, ending in a report
	$(BIN)/python -m jobs.quickstart --config configs/quickstart.yaml $(ARGS)

smoke: install ## the same path on a tiny random model, in seconds
	$(BIN)/python -m jobs.quickstart --config configs/smoke.yaml $(ARGS)

serve: install ## host the published draft head over HTTP
	$(BIN)/python -m serve.run --config configs/serve_smollm2.yaml $(ARGS)

# --- Development ------------------------------------------------------------

# Tests that start Ray have the machine to themselves: two clusters at a time would
# compete for it, and their time-outs with them. With ARGS, one plain pytest.
test: install ## all tests but the soak tests
ifeq ($(strip $(ARGS)),)
	@failed=0; \
	$(BIN)/python -m pytest $(PARALLEL) tests/unit tests/parity || failed=1; \
	$(BIN)/python -m pytest tests/cluster tests/e2e || failed=1; \
	exit $$failed
else
	$(BIN)/python -m pytest $(ARGS)
endif

soak: install ## the tests that kill processes for minutes
	$(BIN)/python -m pytest -m soak $(ARGS)

lint: install ## format, lint, types and architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint ## the same and the unit tests
	$(BIN)/python -m pytest $(PARALLEL) tests/unit -q $(ARGS)

format: install ## rewrite the source the way `check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-setup: ## Debian's Chromium for the browser tests
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then \
	    echo "aerie: chromium is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -o Acquire::Retries=5 update; \
	    apt-get -o Acquire::Retries=5 install --yes --no-install-recommends chromium; \
	else \
	    echo "aerie: the browser tests need the program 'chromium'. On Debian, as root:"; \
	    echo "    apt-get update && apt-get install chromium"; \
	    exit 2; \
	fi

clean: ## remove caches; $(VENV) and runs/ stay
	rm -rf .lock-venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find core jobs serve tests -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
