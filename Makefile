# make demo   sets up .venv, makes the demo's model and data, runs the whole search on this machine (run_name demo)
# make pictures   the demo, then the README's pictures of it
# make setup  sets up .venv only; make demo-data also makes the demo's model and data
# make test   sets up, and runs the linter and all tests
# make check  sets up, and runs the linter and the quick tests: no Ray, no Slurm; make lint: the linter alone
# VENV=path   another environment than .venv; PYTHON=python3.11 another Python to make it with

VENV ?= .venv
PYTHON ?= python3
READY = $(VENV)/.ready-$(shell cksum < requirements.txt | cut -d' ' -f1)

.PHONY: setup demo demo-data pictures lint check test

demo: demo-data
	rm -rf results/demo
	$(VENV)/bin/python raytune_bayesian.py --model demo/model --dataset demo/squad \
		--max_t 16 --num_train_epochs 0.7 --max_eval_samples 200 --run_name demo

pictures: demo
	$(VENV)/bin/python -m hpo.results results/demo --png
	cp results/demo/report-learning-curves.png docs/demo-learning-curves.png
	cp results/demo/report-trials-on-the-slots.png docs/demo-slots.png

setup: $(READY)

demo-data: $(READY)
	$(VENV)/bin/python demo/make_demo.py

lint: $(READY)
	$(VENV)/bin/python -m ruff check --no-cache .

check: lint
	$(VENV)/bin/python -m pytest --numprocesses 2 -m "not slow"

test: lint
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

$(READY): requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
