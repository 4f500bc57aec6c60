# make demo | check | test | test-slow | test-tutorials | test-latest | prepare | outputs | results | docs | dist | clean
# PYTHON=python3.12 chooses the Python of a new .venv
PYTHON ?= python3
FLAGS ?= slow
BIN := .venv/bin
# What `make check` takes of the tests: package, README and notebooks agree, the house stands, networks and weights are right
CHECKED := $(patsubst %,tests/test_%.py,project house options blocks networks resnet weights)
.DELETE_ON_ERROR:
.PHONY: help demo check test test-slow test-tutorials test-latest prepare outputs results docs dist clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: .venv/.installed ## train a ResNet on scikit-learn's digits: no download, under a minute
	@$(BIN)/resnet_fine_tune digits
	@echo 'For Imagenette, after a download of 1.6 GB: $(BIN)/resnet_fine_tune imagenette'

check: .venv/.installed ## before a commit: ruff, package and README as the notebooks say, networks, weights, a run; 1.5 minutes
	$(BIN)/ruff check -q
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'not slow and not tutorials' $(CHECKED)
	@runs=$$(mktemp -d) && $(BIN)/resnet_fine_tune digits --epochs 2 --runs $$runs >$$runs/log && rm -r $$runs

test: .venv/.installed ## every test that is quick enough for every edit
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --skip_folder_re '^[_.]|^tutorials$$' --n_workers 2 --do_print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow and not tutorials' tests

test-slow: .venv/.installed ## what is real but too long for every edit: whole runs, crashes, the built wheel
	$(BIN)/nbdev_test --skip_folder_re '^[_.]|^tutorials$$' --n_workers 0 --flags '$(FLAGS)' --do_print
	$(BIN)/python -m pytest -m slow tests

test-tutorials: .venv/.installed ## the short run of every tutorial and lab, up to 5 minutes each
	$(BIN)/python -m pytest -m tutorials tests

test-latest: dist ## tests/ against the built wheel with the newest fastai and torch, in .venv-latest
	@$(PYTHON) tools/venv.py .venv-latest --upgrade dist/*.whl pytest pytest-xdist hypothesis timm nbconvert ipykernel
	cd .venv-latest && OMP_NUM_THREADS=1 bin/python -m pytest -n 2 -m 'not slow and not tutorials' ../tests

prepare: .venv/.installed ## after editing a notebook: export, clean, README.md, tests
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python -m tools.readme
	$(MAKE) test

outputs: .venv/.installed ## run all notebooks, the tutorials' short runs too, and store what they show
	$(BIN)/python -m tools.outputs
	$(BIN)/nbdev_clean
	$(BIN)/python -m tools.readme

results: .venv/.installed ## which published figures are current, which stale, and which pages show older ones
	@$(BIN)/python -m tools.results

docs: .venv/.installed ## build the site of the pages, with their stored outputs, into _docs/
	@$(BIN)/python -m tools.site.build

dist: .venv/.installed ## build the source archive, and from it the wheel, into dist/
	@rm -rf dist
	$(BIN)/python -m build -q --installer uv

clean: ## remove what make made, except .venv and runs/
	rm -rf _docs dist build *.egg-info .pytest_cache .ruff_cache

.venv/.installed: settings.ini setup.py tools/venv.py
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) is not there: install Python, or name one, as in make demo PYTHON=/path/to/python3' >&2; exit 2; }
	@$(PYTHON) tools/venv.py .venv -e '.[dev]'
	@touch $@
