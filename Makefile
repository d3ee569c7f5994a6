# The commands to type. `make` alone lists them. `make round` and `make test` do their own set-up on a fresh machine.

ifeq ($(origin CLUSTER),undefined)
CLUSTER := local
# A round runs on this machine unless CLUSTER names a site. If a Slurm answers here, the command says so.
SITES := $(filter-out local,$(basename $(notdir $(wildcard hydra_conf/cluster/*.yaml))))
NAME_SITES = if timeout 2 scontrol ping >/dev/null 2>&1; then \
	echo 'A Slurm answers here, but this round runs on this machine. To submit it, set CLUSTER to one of: $(SITES)'; fi
endif
# make would ignore a variable in small letters, so that `make round campaign=mine` would run the demo's next round.
$(foreach name,campaign cluster experiment overrides rounds runs,$(if $(filter command,$(firstword $(origin $(name)))),\
	$(error $(name)=... has no effect: the variables of this Makefile are in capitals, such as CAMPAIGN=mine)))
RUNS ?= runs
CAMPAIGN ?= demo
EXPERIMENT ?= demo
OVERRIDES ?=
ROUNDS ?= 4
# The checkpoint of model=nano_mini: 24 million random weights in the published form of the 30B, outside of the image as the 30B's.
MINIATURE ?= $(CURDIR)/build/nano_mini
ifeq ($(EXPERIMENT),nano_mini)
round campaign: $(MINIATURE)
WEIGHTS := cluster.weights_dir=$(MINIATURE)
endif

PYTHON := .venv/bin/python
# Three processes run the tests, each file in one of them, because tests of a file share their set-up, and many wait for other processes. They
# begin with the files that have slow tests (tests/conftest.py). The Slurm tests share one cluster, so they run in one process. It mostly waits
# for Slurm, and runs beside the others.
TESTS := $(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder
SLURM_TESTS := $(PYTHON) -m pytest --durations=5 -m 'slurm and not drill'
TESTBED := python3 slurm/testbed/testbed.py

ifeq ($(CLUSTER),testbed)
round campaign: NEEDS := testbed
ENTER_TESTBED := exports=$$($(TESTBED) up) && eval "$$exports" &&
endif
test test-long drill attacks testbed-up: NEEDS := testbed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup round campaign miniature drill attacks status image simulate nulls bench test test-fast test-long lint types layers format testbed-up testbed-down clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | tr @ '\t' | expand -t 22
	@echo 'Variables: CAMPAIGN=demo  EXPERIMENT=demo  CLUSTER=local|testbed|<site>  OVERRIDES="key=value ..."  RUNS=folder of campaigns  ROUNDS=4'

setup: ## Install system packages and .venv with pinned versions; does nothing if they are there
	@scripts/setup.sh $(NEEDS)

round: setup ## Freeze the campaign if it is new, then run its next round; CLUSTER=testbed starts a Slurm first
	@$(NAME_SITES)
	$(ENTER_TESTBED) $(PYTHON) -m pipeline round $(RUNS)/$(CAMPAIGN) cluster=$(CLUSTER) experiment=$(EXPERIMENT) $(WEIGHTS) $(OVERRIDES)

miniature: $(MINIATURE) ## Make the checkpoint of model=nano_mini, which has the 30B's shape in 24 million parameters

$(MINIATURE): | setup
	$(PYTHON) -m substrate.base.make_miniature $@

status: setup ## Show what the campaign's newest round is doing
	@$(ENTER_TESTBED) $(PYTHON) -m pipeline status $(RUNS)/$(CAMPAIGN)

image: setup ## Build the image that every trial forks
	$(PYTHON) -m pipeline image build

test: setup lint types layers ## Run all that CI runs: lint, types, layers, every test, and rounds on a Slurm that it starts (root)
	@mkdir -p build && echo 'the Slurm tests run beside the others and write build/slurm_tests.log'; trap : INT; \
	env --default-signal=INT $(SLURM_TESTS) >build/slurm_tests.log 2>&1 & slurm=$$!; \
	REQUIRE_SLURM= $(TESTS) --durations=25 -m 'not slurm and not long'; others=$$?; \
	wait $$slurm; on_slurm=$$?; cat build/slurm_tests.log; exit $$((others || on_slurm))

drill: setup ## Cause real faults on a real Slurm, as an ordinary user of it, and print how each ends (root; half an hour)
	unshare --mount --propagation slave $(PYTHON) tests/slurm/as_site.py $(CURDIR)/$(PYTHON) -m pytest -q -m drill --basetemp=/var/tmp/postrain-drill

attacks: setup ## Attack the sandbox in every way we know, and print how each attack ended and where it ran
	$(PYTHON) -m pytest -q -m attack

campaign: setup ## Run ROUNDS rounds one after the other (on Slurm each meta job submits the next); a new campaign's error rates are for ROUNDS
	$(ENTER_TESTBED) $(PYTHON) -m pipeline campaign $(RUNS)/$(CAMPAIGN) --rounds $(ROUNDS) cluster=$(CLUSTER) experiment=$(EXPERIMENT) $(WEIGHTS) $(OVERRIDES)

simulate: setup ## Measure false alarms and power of the tests, gain and regret of the decision, in simulated campaigns (an hour)
	$(PYTHON) -m pipeline evidence simulate
	$(PYTHON) -m pipeline evidence campaigns

nulls: setup ## Compute the critical values of constitution/nulls again (half an hour)
	$(PYTHON) -m pipeline evidence nulls --write

test-fast: setup ## Run the tests that need no Slurm, without the slow ones
	$(TESTS) -m 'not slurm and not slow and not long'

test-long: setup ## Run what is too long for CI: agents served by a model, kernels that compile, 2,000 ways to tamper with a campaign, 10,000 random ledgers, then `make drill` (root)
	$(PYTHON) -m pytest -q -m long
	TAMPERINGS=2000 $(PYTHON) -m pytest -q -m slow tests/audit/test_examine.py
	$(PYTHON) -m tests.support.ledgers 10000
	$(MAKE) drill

bench: setup ## Run the benchmarks that need no GPU on a quiet machine, and write docs/performance.md (ten minutes)
	$(PYTHON) -m bench.report

lint: setup ## Check the code with ruff
	$(PYTHON) -m ruff check --quiet
	$(PYTHON) -m ruff format --check --quiet

types: setup ## Check the types with mypy
	$(PYTHON) -m mypy

layers: setup ## Check with import-linter that packages import only from layers below them (setup.cfg)
	.venv/bin/lint-imports

format: setup ## Format the code with ruff
	$(PYTHON) -m ruff check --fix --quiet
	$(PYTHON) -m ruff format

testbed-up: setup ## Start a real eight-node Slurm on this host (root)
	@$(TESTBED) up

testbed-down: ## Stop that Slurm with all of its jobs
	@$(TESTBED) down

clean: testbed-down ## Remove build products; campaigns (runs/) and .venv stay
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
