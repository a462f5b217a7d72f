# Two commands: `make run` evaluates the embedded models, `make test` runs every test.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check
# By uv, in a fifth of the time, which looks for files where pip is told to look; else by pip.
FETCH = $(PIP) -c constraints.txt uv && UV_LINK_MODE=copy UV_FIND_LINKS="$$PIP_FIND_LINKS" \
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(WANTED) || $(PIP) $(WANTED)

.PHONY: run test sweep chaos bench lint install concepts notebooks site clean

run: install
	$(BIN)/nbhelpers run $(ARGS)

test: concepts
	OMP_NUM_THREADS=1 $(BIN)/pytest --nbval tests notebooks -n 3 --dist loadfile --no-loadscope-reorder

# Every causal architecture of the installed transformers, built small: which engine serves it, and is it exact?
sweep: concepts
	rm -f outputs/architectures.txt
	OMP_NUM_THREADS=1 NBHELPERS_SWEEP=outputs/architectures.txt $(BIN)/pytest tests/generation/test_architectures.py

# Kill runs at 50 random moments and hold what comes out against an undisturbed one; takes a quarter of an hour.
chaos: install
	$(BIN)/python tools/chaos.py $(ARGS)

# Ours beside its peers and the limit of the machine; about an hour on a quiet one.
bench: install
	$(BIN)/python tools/bench.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed

.venv/installed: WANTED = -c constraints.txt -e ".[dev]"
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(FETCH)
	touch $@

# What notebooks 12, 14, 15 and those from 20 on try besides, the scorers of `text` (13 MB) and axe, which comes with
# Playwright (160 MB), in one go. The tests of `logs` (90 MB) and `bench` (100 MB, and llama.cpp is compiled) skip
# themselves where these are not installed.
concepts: .venv/concepts

.venv/concepts: WANTED = -c constraints.txt -e ".[dev,concepts,applications,text,pages]"
.venv/concepts: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(FETCH)
	touch .venv/installed $@

# The series as a site for a browser, without a network: outputs/site/html/index.html
site: install
	$(PIP) -c constraints.txt -e ".[site]"
	$(BIN)/python tools/make_site.py $(ARGS)

# Execute every notebook again and write it back normalised.
notebooks: concepts
	$(BIN)/python tools/execute_notebooks.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache nbhelpers.egg-info
