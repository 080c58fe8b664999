# Everything from a fresh Debian 12, as root: `make demo`, `make test`, `make bench`.
#
# Packages and the virtual environment come once; the extension is built again when its C changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The whole suite has to end within this time.
TEST_LIMIT := 20m

PACKAGES := criu gcc git iproute2 libc6-dev make nftables nginx-light procps python3-dev python3-venv \
	redis-server util-linux
NATIVE := $(wildcard engine/_native_build.py engine/native/*)

.PHONY: demo test lint bench packages clean

demo: $(VENV)/.built
	$(BIN)/phaul demo

test: lint
	timeout --foreground $(TEST_LIMIT) $(BIN)/python -m pytest

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.built
	$(BIN)/python -m bench

packages:
	@.ci/install-packages $(PACKAGES)

$(VENV)/.built: pyproject.toml setup.py $(NATIVE) | packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info engine/_native.c engine/_native.*.so tests/programs/build
