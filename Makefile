# make demo [QUICK=1]   set up, then train, compress, simulate, sweep and plot on real images
# make test             set up, then the tests; where root may install it, with a browser for those of the report page
# make test-slow        the tests that take minutes
# make verify           the RTL against the simulator: 1,120 random layers on 19 machines
# make bench            the benchmarks
# make performance      measure points per second anew: docs/performance.md
# make search-proof     enumerate a space and search it anew: docs/search.md
# make lint             ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
IMAGES := /usr/share/datasets/fashion-mnist

.PHONY: demo test test-slow verify bench performance search-proof lint setup data browser tools clean

demo: setup data
	$(BIN)/hwsim demo $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT))

test: setup data browser tools
	$(BIN)/python -m pytest

test-slow: setup data
	$(BIN)/python -m pytest -m slow

verify: setup
	$(BIN)/hwsim verify

bench: setup
	$(BIN)/python -m pytest tests/bench -m "" --benchmark-enable --benchmark-columns=min,median,iqr,rounds

performance: setup
	$(BIN)/hwsim bench --out docs/performance.md

search-proof: setup
	$(BIN)/hwsim search-proof --out docs/search.md

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup: $(VENV)/.ready

# torch first and by itself, so that nothing asks for a newer build of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version); try make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(PIP) --editable '.[dev]'
	@touch $@

# Debian's package of the images, where apt and the rights are there; else hwsim looks in its cache, downloads, or falls back.
data:
	@if [ ! -d $(IMAGES) ] && command -v apt-get >/dev/null; then \
	  if [ "$$(id -u)" = 0 ]; then asroot=; elif sudo -n true 2>/dev/null; then asroot="sudo -n"; else exit 0; fi; \
	  echo "installing Debian's dataset-fashion-mnist"; \
	  ($$asroot apt-get -qq install -y dataset-fashion-mnist || \
	    ($$asroot apt-get -qq update && $$asroot apt-get -qq install -y dataset-fashion-mnist)) >/dev/null 2>&1 || \
	    echo "could not install it; hwsim will look elsewhere for the images"; \
	fi

# Debian's browser for the tests of the report page, where apt and the rights are there; else those tests are skipped and say so.
browser:
	@if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing Debian's chromium"; \
	  (apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core || \
	    (apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core)) >/dev/null 2>&1 || \
	    echo "could not install it; the tests in a browser are skipped"; \
	fi

# Yosys and a cell library for the few tests of synthesis, where apt and the rights are there; else these tests are skipped.
tools:
	@if ! { command -v yosys && [ -d /usr/share/qflow/tech/osu018 ]; } >/dev/null && command -v apt-get >/dev/null; then \
	  if [ "$$(id -u)" = 0 ]; then asroot=; elif sudo -n true 2>/dev/null; then asroot="sudo -n"; else exit 0; fi; \
	  echo "installing Debian's yosys and qflow-tech-osu018"; \
	  tools="--no-install-recommends yosys qflow-tech-osu018"; \
	  ($$asroot apt-get -qq install -y $$tools || \
	    ($$asroot apt-get -qq update && $$asroot apt-get -qq install -y $$tools)) >/dev/null 2>&1 || \
	    echo "could not install them; the tests of synthesis are skipped"; \
	fi

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
