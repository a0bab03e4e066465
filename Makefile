# Set-up, checks, tests and the demonstration. Everything lands in .venv, .venv-* and build/; all may be removed at any time.

PYTHON ?= 3.11
# Release of vLLM-Omni. A release of the next series has an environment and a lock file of its own.
OMNI ?= 0.30.0
NEXT := $(filter-out 0.30.%,$(OMNI))
VENV := .venv$(addprefix -,$(NEXT))
CPU := cpu$(if $(NEXT),-next)
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.port-kit-set-up$(LATEST)
LOCK := requirements/lock$(addprefix -,$(NEXT)).txt
DOCS := $(VENV)/.port-kit-docs
PAGE := $(VENV)/.port-kit-page
TRITON := build/triton
APT := apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20
NO_BROWSER := *** NOT TESTED: the web page. gradio, playwright or Chromium cannot be installed here, see above. ***
# Port of the demonstration.
PORT ?= ovi
EXAMPLE := examples/offline_inference/$(PORT)
DEMO := build/demo$(addprefix /,$(filter-out ovi,$(PORT)))
# Ovi's tiny model is trained; it knows the prompts of benchmarks/tiny_world.
WEIGHTS_ovi := --trained
REQUEST_ovi := --height 64 --width 96 --num-inference-steps 25 \
  --prompt "A red ball bounces quickly to the right. Audio: a high tone at every bounce."

# uv reads neither pip's certificates nor pip's wheel folders by itself.
ifdef PIP_CERT
export SSL_CERT_FILE := $(PIP_CERT)
endif
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX := $(PIP_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
WHEELS := $(foreach place,$(PIP_FIND_LINKS),--find-links $(place))
else
WHEELS := --torch-backend=cpu
endif
export UV_HTTP_TIMEOUT ?= 180

# The versions of the lock file, or with LATEST=1 the newest ones that setup.cfg allows.
ifdef LATEST
VERSIONS := --upgrade
TRITON_VERSION := triton>=3.4
else
VERSIONS := --constraints $(LOCK) --build-constraints $(LOCK)
TRITON_VERSION := triton==3.9.0
endif
INSTALL = $(UV) pip install --quiet --python $(RUN) --overrides requirements/overrides.txt $(VERSIONS) $(WHEELS)

UV := $(shell command -v uv)
ifeq ($(UV),)
UV := build/uv/bin/uv
endif

# One thread per process: two pytest workers share the cores, and forked ranks multiply them.
export OMP_NUM_THREADS ?= 1
# Without bytecode, each process compiles some 8000 modules of torch and vLLM-Omni, more than half of a start. The
# self-check of set-up writes it, also for processes outside of make that may not.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help set-up lock demo test test-fast test-page browser coverage check tree docs clean

help:
	@echo "make demo    set up, assemble a tiny model from a loopback Hub, generate $(DEMO)/demo.mp4 and draw it: demo.png;"
	@echo "             with PORT=dreamid_omni or PORT=mova, another port with random weights, in build/demo/PORT"
	@echo "make test    set up, check, and run the tests"
	@echo "make test-fast  the tests of the inner loop"
	@echo "make test-page  the tests of the web page, in a browser: installs gradio, playwright and, by apt-get, Chromium;"
	@echo "             with OPTIONAL=1, says so and succeeds where they cannot be installed"
	@echo "make coverage   run the tests, measure coverage, write build/coverage"
	@echo "make set-up  install the locked versions into .venv; with LATEST=1 the newest that are allowed"
	@echo "             with OMNI=0.32.0rc1, any target uses that vLLM-Omni, in .venv-0.32.0rc1"
	@echo "make lock    write $(LOCK) anew"
	@echo "make check   set up, lint, check imports and types"
	@echo "make docs    write the generated pages, build the site in build/site, check its links"
	@echo "make clean   remove build/ and all environments"

set-up: $(STAMP)

build/uv/bin/uv:
	python3 -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv

$(STAMP): setup.cfg pyproject.toml $(wildcard requirements/*) | $(filter build/%,$(UV))
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(INSTALL) -e '.[$(CPU),omni,dev]'
	$(RUN) requirements/without_cuda.py
	$(RUN) -c 'from port_kit.runtime.self_check import run_self_check; run_self_check()' >$(VENV)/self-check.log
	@rm -f $(VENV)/.port-kit-*
	@touch $@

# Releases of all dependencies, for every supported version of Python.
lock: | $(filter build/%,$(UV))
	$(UV) pip compile --quiet --universal --upgrade --python-version 3.11 --overrides requirements/overrides.txt \
	  $(addprefix --extra ,$(CPU) omni dev docs) $(WHEELS) --no-annotate --custom-compile-command 'make lock' setup.cfg --output-file $(LOCK)

# Triton's interpreter runs the kernels' tests on a CPU. It stays out of .venv: vLLM for CPU would look at it and complain.
$(TRITON): $(STAMP)
	$(UV) pip install --quiet --python $(RUN) --target $(TRITON) $(WHEELS) '$(TRITON_VERSION)'
	@touch $@

# The loopback Hub of --tiny must not be looked for behind a proxy.
demo: export NO_PROXY := 127.0.0.1,localhost,$(NO_PROXY)
demo: $(STAMP)
	@mkdir -p $(DEMO)
	$(RUN) $(EXAMPLE)/download_$(PORT).py --tiny $(WEIGHTS_$(PORT)) --output-dir $(DEMO)/model
	$(RUN) $(EXAMPLE)/generate_$(PORT).py --model $(DEMO)/model --tiny --enforce-eager $(REQUEST_$(PORT)) \
	  --output $(DEMO)/demo.mp4 --contact-sheet $(DEMO)/demo.png

# models/ is imported as port_kit.models through package_dir, which import-linter, mypy and griffe do not read: link a tree
# of that form.
tree:
	@rm -rf build/types && mkdir -p build/types/port_kit
	@ln -s $(addprefix ../../../,$(wildcard port_kit/*)) build/types/port_kit/
	@ln -s ../../../models build/types/port_kit/models

check: $(STAMP) tree
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	cd build/types && ../../$(VENV)/bin/lint-imports --no-logo ../../pyproject.toml
	cd build/types && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml --no-incremental -p port_kit

test: check $(TRITON)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The inner loop: without the modules that tests/conftest.py marks as integration tests.
test-fast: $(STAMP)
	$(RUN) -m pytest -n 2 --dist loadfile -m 'not gpu and not slow and not integration and not page'

# gradio asks for older releases of some packages than those of the lock file, with which it works too: those win.
$(PAGE): $(STAMP)
	$(INSTALL) $(if $(LATEST),,--overrides $(LOCK)) -e '.[page]' playwright
	@touch $@

# Playwright drives the system's Chromium and downloads none.
browser: export DEBIAN_FRONTEND := noninteractive
browser: $(PAGE)
	@chromium --version || chromium-browser --version || google-chrome --version || \
	  { $(APT) update && $(APT) install -y --no-install-recommends chromium && chromium --version; }

# Only a machine on which Chromium cannot be installed may leave these tests out, and only with OPTIONAL=1.
test-page:
	@if $(MAKE) --no-print-directory browser; then $(RUN) -m pytest -m page tests/page; \
	elif [ -n "$(OPTIONAL)" ]; then echo "$(NO_BROWSER)" >&2; else exit 1; fi

coverage: $(TRITON)
	$(RUN) -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-report=html --cov-report=xml

$(DOCS): $(STAMP)
	$(INSTALL) -e '.[docs]'
	@touch $@

# Generated pages (a test refuses stale ones), then the site in build/site; a broken link fails.
docs: $(DOCS) tree
	$(RUN) -m port_kit.docgen
	$(RUN) tools/site.py build/pages
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf build .venv .venv-*
