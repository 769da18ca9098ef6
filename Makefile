# Two commands on a fresh machine: `make book` and `make test`. Each sets up what it needs.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help env book serve test chapters grid doctor weights lint lock clean

# exec: else SIGTERM ends the shell that make has started, and not what that shell runs

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

env: $(READY)  ## the virtual environment in .venv, from requirements.lock

book: $(READY)  ## execute the chapters and publish _build/html (PARAMS=book/params/gpu.yaml)
	@exec $(BIN)/python book/build.py $(if $(PARAMS),--params "$(PARAMS)") \
		$(if $(WORKERS),--workers $(WORKERS))

serve: $(READY) | _build/html/index.html  ## show the book on 127.0.0.1 (PORT=8000)
	@echo "http://127.0.0.1:$(PORT)/ shows the book; Ctrl-C stops"
	@exec $(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

_build/html/index.html:
	@$(MAKE) --no-print-directory book

test: $(READY)  ## library, chapters at test size, pages in a browser (RELEASE=1: long tests too)
	@OMP_NUM_THREADS=1 exec $(BIN)/python -m pytest -n auto --no-loadscope-reorder \
		$(if $(RELEASE),,-m "not release")

chapters: $(READY)  ## only the chapters at test size
	@exec $(BIN)/python -m pytest -m chapter

grid: $(READY)  ## run a chapter with each cell of a grid (GRID=book/grids/NAME.yaml)
	@exec $(BIN)/python -m hallulib grid "$(GRID)" $(if $(WORKERS),--workers $(WORKERS))

doctor: $(READY)  ## what is installed, what is wrong with it, what chapters took here
	@exec $(BIN)/python -m hallulib doctor

weights: $(READY)  ## train the weights that ship with the library anew (three hours or more)
	@exec $(BIN)/python -c "from hallulib import data, oneshot; \
		from hallulib.diffusion import train; from hallulib.storage import store; \
		images = data.open('lesions', 32); \
		run = train.pretrained(images, scheme='isup', steps=4000, width=24, from_scratch=True)[1]; \
		print(store.ship(run, 'score-lesions')); \
		images = images.hold_out('isup', ['4', '5']); \
		trial = oneshot.Trial('isup', 'isup', n_way=2, pretraining=2000); \
		train.pretrained(images, scheme='isup', steps=2000, width=24, from_scratch=True); \
		run = oneshot.run(images, trial, from_scratch=True).folder; \
		print(store.ship(run, 'one-shot-lesions'))"
	@exec $(BIN)/python -c "from hallulib import augment, data; from hallulib.storage import store; \
		images, new = data.open('histology', 32), dict(from_scratch=True); \
		trial = augment.Trial('tissue', share=0.1, encoding=2500, factor=2, pretraining=10000); \
		prior = augment.pretrained(images, trial, **new); \
		noisy, clean = (augment.classifier(images, trial, prior, noised=told, **new)[1] \
			for told in (True, False)); \
		names = 'autoencoder', 'latent-score', 'noise-aware', 'clean'; \
		[print(store.ship(run, name + '-histology')) \
			for run, name in zip((*prior.folders, noisy, clean), names, strict=True)]"

lint: $(READY)  ## style of code and notebooks, types of the library, outputs in notebooks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/nbstripout --keep-id --verify book/*.ipynb book/grids/*.ipynb

lock: $(READY)  ## renew requirements.lock and environment.yml from requirements.in
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 \
		--custom-compile-command "make lock" requirements.in -o requirements.lock
	@$(BIN)/python .ci/environment.py > environment.yml

clean:  ## remove everything that was built, the environment too
	rm -rf _build .venv

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "make needs Python 3.11 or later: found $$($(PYTHON) --version 2>&1), name another by PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "make needs the venv module of $(PYTHON): install it (Debian: apt-get install python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "making a virtual environment in .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "installing requirements.lock into .venv (7 GB, some minutes at the first time)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on \
		--no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--no-deps --no-build-isolation --editable .
	@touch $@
