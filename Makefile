# What one types. `make round` and `make test` do all of their own set-up on a fresh machine; `make` alone lists the targets.

ifeq ($(origin CLUSTER),undefined)
CLUSTER := local
# Nobody is put into a queue without asking for it, but where there is one it is named.
SITES := $(filter-out local,$(basename $(notdir $(wildcard hydra_conf/cluster/*.yaml))))
NAME_SITES = if timeout 2 scontrol ping >/dev/null 2>&1; then \
	echo 'A Slurm answers here. This round runs on this machine alone; to submit it, CLUSTER= one of: $(SITES)'; fi
endif
# A variable in small letters would be taken for nothing, and `make round campaign=mine` for the demo's next round.
$(foreach name,campaign cluster experiment overrides rounds runs,$(if $(filter command,$(firstword $(origin $(name)))),\
	$(error $(name)=... is no variable of this Makefile; they are in capitals)))
RUNS ?= runs
CAMPAIGN ?= demo
EXPERIMENT ?= demo
OVERRIDES ?=
ROUNDS ?= 4

PYTHON := .venv/bin/python
# Two at once, a file to one of them: what a file sets up is set up once. The Slurm set has one cluster and runs alone.
TESTS := $(PYTHON) -m pytest -n 2 --dist loadfile
TESTBED := python3 slurm/testbed/testbed.py

ifeq ($(CLUSTER),testbed)
round campaign: NEEDS := testbed
ENTER_TESTBED := exports=$$($(TESTBED) up) && eval "$$exports" &&
endif
test drill attacks testbed-up: NEEDS := testbed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup round campaign drill attacks status image simulate nulls test test-fast lint types floors format testbed-up testbed-down clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | tr @ '\t' | expand -t 22
	@echo 'Variables: CAMPAIGN=demo  EXPERIMENT=demo  CLUSTER=local|testbed|<site>  OVERRIDES="key=value ..."  RUNS=folder of campaigns  ROUNDS=4'

setup: ## System packages and .venv with pinned versions; nothing to do when they are there
	@scripts/setup.sh $(NEEDS)

round: setup ## Freeze the campaign if it is new, then run its next round; CLUSTER=testbed starts a Slurm for it
	@$(NAME_SITES)
	$(ENTER_TESTBED) $(PYTHON) -m pipeline round $(RUNS)/$(CAMPAIGN) cluster=$(CLUSTER) experiment=$(EXPERIMENT) $(OVERRIDES)

status: setup ## What the campaign's newest round is doing
	@$(PYTHON) -m pipeline status $(RUNS)/$(CAMPAIGN)

image: setup ## Build the image that every trial forks
	$(PYTHON) -m pipeline image build

test: setup lint types floors ## All that CI runs: lint, types, floors, every test, rounds on a Slurm of its own (root)
	REQUIRE_SLURM= $(TESTS) --durations=15 -m 'not slurm'
	$(PYTHON) -m pytest --durations=5 -m 'slurm and not drill'

drill: setup ## Play real faults on a real Slurm, as an ordinary user of it, and print what each ends in (root; half an hour)
	unshare --mount --propagation slave $(PYTHON) tests/slurm/as_site.py $(CURDIR)/$(PYTHON) -m pytest -q -m drill --basetemp=/var/tmp/postrain-drill

attacks: setup ## Attack the sandbox in every way we know and print how each ended, and where it ran
	$(PYTHON) -m pytest -q -m attack

campaign: setup ## Run ROUNDS rounds one after the other (on Slurm each meta job submits the next)
	$(ENTER_TESTBED) $(PYTHON) -m pipeline campaign $(RUNS)/$(CAMPAIGN) --rounds $(ROUNDS) cluster=$(CLUSTER) experiment=$(EXPERIMENT) $(OVERRIDES)

simulate: setup ## Measure false alarms and power of the tests, gain and regret of the decision, in simulated campaigns (seven minutes)
	$(PYTHON) -m pipeline evidence simulate
	$(PYTHON) -m pipeline evidence campaigns --campaigns 100

nulls: setup ## Compute the critical values of constitution/nulls anew (half an hour)
	$(PYTHON) -m pipeline evidence nulls

test-fast: setup ## The tests that need no Slurm, but for the slow ones
	$(TESTS) -m 'not slurm and not slow'

lint: setup ## ruff
	$(PYTHON) -m ruff check --quiet
	$(PYTHON) -m ruff format --check --quiet

types: setup ## mypy
	$(PYTHON) -m mypy

floors: setup ## import-linter: who may import whom, and one door per library (setup.cfg)
	.venv/bin/lint-imports

format: setup ## Rewrite the code as ruff would have it
	$(PYTHON) -m ruff check --fix --quiet
	$(PYTHON) -m ruff format

testbed-up: setup ## Start a real eight-node Slurm on this host (root)
	@$(TESTBED) up

testbed-down: ## Stop it, with all of its jobs
	@$(TESTBED) down

clean: testbed-down ## Remove what was built; campaigns (runs/) and .venv stay
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
