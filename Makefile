# Every target makes or reuses .venv by itself.
#     make                       what there is
#     make figures PROFILE=quick JOBS=2
#     make figures PROFILE=fashion DATA=multifashion ROOT=where/it/lies
#     make figures OVERRIDES='{"dense.steps": 200}'
#     make figures PROFILE=zoo RESTORE=1     go on from committed tables: only what is missing
#     make figures PLUGIN=my.py  with a criterion, data set, ... of your own: docs/code.md
#     make figures ON=slurm      on a cluster: docs/cluster.md

PROFILE = quick
DATA = rooms
ROOT =
OVERRIDES =
PLUGIN =
BASE =
JOBS =
RESTORE =
ON =
PYTHON3 = python3
BIN = .venv/bin
INSTALLED = .venv/.installed
# What only tests need: networks that none of us wrote, and TorchJD with a solver for the weightings.
# In a folder of their own: Torch-Pruning imports what it finds of the networks, which would take
# every process a second.
FOREIGN = .venv/foreign/.installed
# What Kubernetes needs (ON=kubernetes, and its tests), apart for the same reason.
KUBERNETES = .venv/kubernetes/.installed
# The console command mtprune, of this working tree.
MTPRUNE = $(BIN)/python -m mtprune_utils.run.cli
# What makes the site, apart likewise.
SITE = .venv/site/.installed
# Values reach the programs as they are, through the environment: neither make nor a shell expands
# them. A dollar may be doubled, as usual for make.
override PROFILE := $(subst $$$$,$$,$(value PROFILE))
override DATA := $(subst $$$$,$$,$(value DATA))
override ROOT := $(subst $$$$,$$,$(value ROOT))
override OVERRIDES := $(subst $$$$,$$,$(value OVERRIDES))
override PLUGIN := $(subst $$$$,$$,$(value PLUGIN))
override BASE := $(subst $$$$,$$,$(value BASE))
override JOBS := $(subst $$$$,$$,$(value JOBS))
override ON := $(subst $$$$,$$,$(value ON))
export PROFILE DATA ROOT OVERRIDES PLUGIN BASE JOBS ON
SETTINGS = --profile "$$PROFILE" --data "$$DATA" --root "$$ROOT"
CHANGED = $${OVERRIDES:+--overrides "$$OVERRIDES"} $${PLUGIN:+--plugin "$$PLUGIN"}
RESTORED = $(if $(RESTORE),--restore)
AT_ONCE = $${JOBS:+--jobs "$$JOBS"} $${ON:+--on "$$ON"}
RENEW_README = $(BIN)/python -m tools.readme
# One thread: results differ in the last digits between one thread and two.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export PYTHONUTF8 = 1

.DEFAULT_GOAL = help
.PHONY: help figures smoke study claims plan lint test test-slurm stress check vouch bench bench-run gpu bench-scores bench-capacity notebooks readme site lab lock audit rooms clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

figures: $(INSTALLED) $(if $(filter kubernetes,$(ON)),$(KUBERNETES))  ## train what is missing and draw every figure (PROFILE=quick, JOBS=one per core)
	@$(MTPRUNE) figures $(SETTINGS) $(CHANGED) $(RESTORED) $(AT_ONCE)
	@$(RENEW_README)

smoke: $(INSTALLED)  ## the same with the smallest profile, in a few minutes
	@$(MTPRUNE) figures --profile smoke $(AT_ONCE)

study: $(INSTALLED)  ## go on with the study that decides the claims, from its committed tables (hours, in as many sittings as you like)
	@$(MTPRUNE) figures --profile study --restore $(AT_ONCE)
	@$(RENEW_README)

claims: $(INSTALLED)  ## judge the claims by the runs finished so far, training nothing (PROFILE=quick)
	@$(MTPRUNE) claims $(SETTINGS) $(CHANGED)
	@$(RENEW_README)

lint: $(INSTALLED)  ## ruff (rules and layout) and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(INSTALLED) $(FOREIGN) $(KUBERNETES) $(SITE)  ## run the tests, then every notebook against its committed outputs (removes runs/smoke first)
	$(BIN)/python -m pytest -n 2 --dist loadfile --doctest-modules tests mtprune_utils
	rm -rf runs/smoke figures/smoke
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --nbval-lax --nbval-current-env notebooks

test-slurm: $(INSTALLED)  ## run a batch on SLURM, which is installed (Debian, root) and runs on this machine alone for it (six minutes)
	@command -v slurmctld >/dev/null && command -v munged >/dev/null || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge >/dev/null; }
	MTPRUNE_SLURM=1 $(BIN)/python -m pytest tests/test_slurm.py

plan: $(INSTALLED)  ## how long a batch will take, on how many workers, and what limits it (PROFILE=quick)
	@$(MTPRUNE) plan $(SETTINGS) $(CHANGED)

stress: $(INSTALLED)  ## kill real runs twenty times, at random moments, and compare what they end with (minutes)
	MTPRUNE_KILLS=20 $(BIN)/python -m pytest tests/test_interruption.py -k killed -s

check: $(INSTALLED)  ## name each figure whose code, numbers or data have changed since it was made
	@$(MTPRUNE) check

vouch: $(INSTALLED)  ## repeat committed runs by the code as it is, and note if it gives the same numbers (PROFILE=quick, BASE=commit)
	$(MTPRUNE) vouch $(SETTINGS) $${BASE:+--base "$$BASE"}

bench: $(INSTALLED)  ## measure speed as ratios, into benchmarks/results (twenty minutes; nothing else may run)
	$(BIN)/python benchmarks/ratios.py

bench-run: $(INSTALLED)  ## time a complete pruning run, removal by removal, into benchmarks/throughput (PROFILE=quick; paper needs a GPU)
	$(BIN)/python benchmarks/throughput.py --profile "$$PROFILE"

gpu: $(INSTALLED)  ## what one GPU says in a quarter of an hour, into benchmarks/results/<machine> (needs a GPU)
	$(BIN)/python benchmarks/gpu.py

bench-scores: $(INSTALLED)  ## how far scores on fewer minibatches, or in bf16, agree with all in float32 (trains, an hour)
	$(BIN)/python benchmarks/scores.py

bench-capacity: $(INSTALLED)  ## what a network with a quarter of the filters, trained alike, loses (minutes)
	$(BIN)/python benchmarks/capacity.py

notebooks: $(INSTALLED)  ## execute the notebooks anew, in place: how their committed outputs are made
	@$(MTPRUNE) refresh

readme: $(INSTALLED)  ## write the README's tables anew from figures (the targets above that draw any do it too)
	$(RENEW_README)

site: $(INSTALLED) $(SITE)  ## make notebooks, figures, criteria, how-to pages and reference into static pages, in _site/html
	@PYTHONPATH=.venv/site $(BIN)/python docs/site/pages.py _site

# A notebook that is only looked at and run stays as it is committed.
LAB_SETTINGS = .venv/share/jupyter/lab/settings
lab: $(INSTALLED)  ## open the repository in JupyterLab, at its notebooks, on this machine only (they are saved when you save them)
	@mkdir -p $(LAB_SETTINGS)
	@echo '{"@jupyterlab/docmanager-extension:plugin": {"autosave": false}}' > $(LAB_SETTINGS)/overrides.json
	$(BIN)/jupyter lab --ip=localhost --LabApp.default_url=/lab/tree/notebooks

LOCK = uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet

# What a batch on Kubernetes needs beside requirements.lock, and what its tests need. Without
# dependencies: botocore asks for an older python-dateutil than snakemake has, and works with it.
CLOUD = snakemake-executor-plugin-kubernetes==0.5.1 kubernetes==32.0.1 google-auth==2.63.0 \
	cryptography==50.0.2 requests-oauthlib==2.0.0 oauthlib==4.0.1 durationpy==0.11 \
	pyasn1==0.6.5 pyasn1-modules==0.4.2 snakemake-storage-plugin-s3==0.3.6 boto3==1.44.8 \
	botocore==1.44.8 s3transfer==0.19.3 jmespath==1.1.0

# What makes the site and is not in requirements.lock: docs/site.md says why these.
PAGES = sphinx==9.0.4 furo==2025.12.19 sphinx-basic-ng==1.0.0b2 accessible-pygments==0.0.5 \
	alabaster==1.0.0 imagesize==2.0.1 roman-numerals==4.1.0 snowballstemmer==3.1.1 \
	sphinxcontrib-applehelp==2.0.0 sphinxcontrib-devhelp==2.0.0 sphinxcontrib-htmlhelp==2.1.0 \
	sphinxcontrib-jsmath==2.0.0 sphinxcontrib-qthelp==2.0.0 sphinxcontrib-serializinghtml==2.0.0 \
	myst-nb==1.4.0 myst-parser==5.2.0 markdown-it-py==4.3.0 mdit-py-plugins==0.7.0 mdurl==0.1.2 \
	jupyter-cache==1.0.1 importlib-metadata==8.7.0 zipp==4.1.2 griffelib==2.4.1 \
	latex2mathml==3.81.1 vl-convert-python==1.9.0.post1

lock:  ## resolve requirements.txt anew into requirements.lock, and make audit's tool into its own: every package, with the hashes of its files (needs uv)
	$(LOCK) requirements.txt -o requirements.lock
	printf '%s\n' timm==1.0.31 segmentation-models-pytorch==0.6.0 torchjd==0.18.0 qpsolvers==4.13.0 quadprog==0.1.14 | $(LOCK) --no-deps - -o requirements-foreign.lock
	printf '%s\n' $(CLOUD) | $(LOCK) --no-deps - -o requirements-kubernetes.lock
	printf '%s\n' $(PAGES) | $(LOCK) --no-deps - -o requirements-site.lock
	echo 'pip-audit==2.10.1' | $(LOCK) - -o requirements-audit.lock

audit:  ## look for known vulnerabilities in what is installed (needs the network)
	$(PYTHON3) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-audit.lock
	.venv/audit/bin/pip-audit --disable-pip --require-hashes -r requirements.lock

rooms: $(INSTALLED)  ## render the embedded data set again, from its seeds
	$(BIN)/python -m tools.render_rooms.render --out mtprune_utils/datasets/rooms_v1

clean:  ## remove the runs, the site and caches (figures stay, except the smoke profile's)
	rm -rf runs figures/smoke _site .snakemake .pytest_cache
	find mtprune_utils tools benchmarks notebooks tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean  ## the same, and .venv
	rm -rf .venv

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, this is $$($(PYTHON3) --version 2>&1): make PYTHON3=python3.11 ..."; exit 1; }
	@test ! -L .venv || { echo ".venv is a link to another folder's environment, which stays as it is: remove the link for one of this folder"; exit 1; }
	@echo "Installing into .venv (about 6 GB, some minutes) ..."
	@test -x $(BIN)/python || $(PYTHON3) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(FOREIGN): requirements-foreign.lock $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade --target .venv/foreign -r requirements-foreign.lock
	@touch $@

$(KUBERNETES): requirements-kubernetes.lock $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade --target .venv/kubernetes -r requirements-kubernetes.lock
	@touch $@

$(SITE): requirements-site.lock $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade --target .venv/site -r requirements-site.lock
	@touch $@
