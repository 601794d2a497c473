# make demo · make test · make test-hosts · make test-full · make test-faults · make test-soak · make test-e2e
# make bench · make bench-quick SEED=n · make bench-speed · make world · make comfy · make lint
#
# .venv is for development only; inside ComfyUI the pack needs nothing beyond what ComfyUI installs.

PYTHON ?= python3
BIN := .venv/bin
FOUND = $(shell $(PYTHON) -m headless.comfy)
COMFYUI_REPOSITORY ?= https://github.com/comfyanonymous/ComfyUI
COMFYUI_VERSION ?= v0.33.0
RUN = PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m pytest
TWO = -n 2 --dist loadfile  # two cores; tests of a file share what was made for them

.PHONY: setup comfyui test test-hosts test-full test-faults test-soak test-e2e bench bench-quick bench-speed world demo comfy lint clean

setup: .venv/ready comfyui

.venv/ready: requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements-dev.txt -c constraints.txt
	$(BIN)/pip install --quiet --no-deps perfusion-pytorch==0.1.23  # the oracle; its open_clip is not needed
	touch $@

# Where ComfyUI is not at $$COMFYUI_PATH, in the pack's own parent or at ~/comfy/ComfyUI, it is cloned.
comfyui: .venv/ready
	@if [ -z "$(FOUND)" ]; then \
	  git clone --quiet --depth 1 --branch $(COMFYUI_VERSION) $(COMFYUI_REPOSITORY) build/ComfyUI \
	  || { rm -rf build/ComfyUI; echo "!!! COMFYUI WAS NOT FOUND AND COULD NOT BE CLONED: ALL TESTS AGAINST THE REAL HOST ARE SKIPPED !!!"; }; \
	fi
	@comfy=$$($(PYTHON) -m headless.comfy); \
	if [ -n "$$comfy" ] && ! cmp -s "$$comfy/requirements.txt" .venv/comfyui-requirements.txt; then \
	  $(BIN)/pip install --quiet -r "$$comfy/requirements.txt" -c constraints.txt \
	  && cp "$$comfy/requirements.txt" .venv/comfyui-requirements.txt; \
	fi

test: setup lint
	OMP_NUM_THREADS=1 $(RUN) $(TWO) -m "not full and not e2e and not faults and not soak" tests
	if [ -n "$(FOUND)" ]; then OMP_NUM_THREADS=2 $(RUN) -m full tests/test_full.py -k sd1; fi

# On every checkout of ComfyUI in HOSTS (paths with colons between them), each with the packages of its own that it pins.
# Four minutes each. The counts go to bench/results/hosts.json.
HOSTS ?= $(FOUND)
test-hosts: setup
	@failed=0; for host in $$(echo "$(HOSTS)" | tr : " "); do \
	  version=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' $$host/comfyui_version.py); echo "== ComfyUI $$version"; \
	  $(BIN)/pip install --quiet --no-deps --upgrade --target .venv/hosts/$$version $$(grep "^comfyui-" $$host/requirements.txt) \
	  && PYTHONPATH=$$PWD/.venv/hosts/$$version COMFYUI_PATH=$$host OMP_NUM_THREADS=1 \
	    $(RUN) $(TWO) -m "host and not full and not e2e and not faults and not soak" tests || failed=1; \
	done; exit $$failed

test-full: setup
	OMP_NUM_THREADS=2 $(RUN) -m full tests

# Bad files by the ten thousand, and hundreds of kills: ten minutes. The counts go to bench/results/faults.json.
test-faults: setup
	OMP_NUM_THREADS=1 $(RUN) -m faults tests/faults

# A thousand runs of all kinds in one server, seven minutes. The counts go to bench/results/soak.json.
test-soak: setup
	OMP_NUM_THREADS=1 $(RUN) -m soak tests/soak

# What an artist sees, in a real browser before a real server. pip installs what drives the browser and not the browser:
# that is Debian's chromium, Playwright's own or the one at $$CHROMIUM, and where there is none the tests say what to install.
test-e2e: setup
	OMP_NUM_THREADS=1 $(RUN) -m e2e tests/e2e

bench-speed: setup
	$(BIN)/python -m bench.speed

# One picture of a creature becomes a concept, on the small model that comes with the pack. ComfyUI is not needed.
demo: .venv/ready
	$(BIN)/python -m headless demo

# The small model itself, from nothing. What is trained is kept in build/world, and goes on where it was stopped.
world: .venv/ready
	$(BIN)/python -m bench world

bench: .venv/ready
	$(BIN)/python -m bench all

SEED ?= 1
bench-quick: .venv/ready
	$(BIN)/python -m bench quick --seed $(SEED)

comfy: setup
	$(BIN)/python -m headless comfy

lint: .venv/ready
	$(BIN)/ruff check .

clean:
	rm -rf .venv build
