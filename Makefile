# make repro: the study from images to report. make test: everything that a contributor must pass. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE := 1
EXPLAINED := CVE-2025-69872 # findings that stay, with their reasons in nbs/safety.ipynb

.PHONY: help repro test test-long style docs bench notebooks readme lock audit clean
help: ## these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

.venv/installed: requirements.lock settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"make: Python 3.10 to 3.13 is needed, {sys.executable} is %d.%d; name another: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

data:
	$(MAKE) --no-print-directory .venv/installed
	cmid_sample data

repro: .venv/installed | data ## run the study; what is up to date is left alone
	@dvc repro
	@echo "The report: $(CURDIR)/reports/report.html"

test: style ## formatted, exported, notebooks run, tests pass (minutes)
	@sh tests/no_diff.sh
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --do_print --timing
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadscope --no-loadscope-reorder

test-long: .venv/installed ## what takes long: hundreds of kills, whole trainings (an hour)
	pytest -m long

style: .venv/installed ## ruff, then how the code reads: widths, sizes, imports
	@ruff format --check --quiet . || { echo "run: ruff format ." >&2; exit 1; }
	@ruff check --quiet .
	@python tests/tools/style.py

docs: .venv/installed ## build the site of the notebooks in _docs/, and check its links
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict -f docs/mkdocs.yml
	python docs/check_links.py _docs

bench: .venv/installed ## measure what steps and inferences cost on this machine, for results/bench
	cmid_bench --grid

notebooks: .venv/installed ## execute the library notebooks in place, outputs and all
	nbdev_export
	for o in nbs/[0-9]_*/*.ipynb nbs/*.ipynb; do jupyter nbconvert --to notebook --execute --inplace --log-level WARN $$o || exit 1; done
	nbdev_clean
	$(MAKE) --no-print-directory readme

readme: .venv/installed ## render README.md from nbs/index.ipynb
	cmid_readme

lock: ## write requirements.lock anew (needs uv)
	$(PYTHON) -c 'from configparser import ConfigParser; c = ConfigParser(delimiters=["="]); c.read("settings.ini"); s = c["DEFAULT"]; print("\n".join(s["requirements"].split() + s["dev_requirements"].split()))' | uv pip compile --universal --python-version 3.10 --no-annotate --no-header --quiet --output-file requirements.lock -

audit: .venv/installed ## compare requirements.lock with the public database of weaknesses (needs the network)
	$(BIN)/python -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	.venv/audit/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip --requirement requirements.lock $(EXPLAINED:%=--ignore-vuln %)

clean: ## remove what stages wrote (not data, not .venv, not DVC's cache)
	rm -rf prepared checkpoints models reports digests
