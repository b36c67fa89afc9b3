# make demo   sets up .venv, makes the demo's model and data, runs the whole search on this machine (run_name demo)
# make test   sets up and runs every test
# VENV=path   another environment than .venv; PYTHON=python3.11 another Python to make it with

VENV ?= .venv
PYTHON ?= python3
READY = $(VENV)/.ready-$(shell cksum < requirements.txt | cut -d' ' -f1)

.PHONY: demo demo-data test

demo: demo-data
	rm -rf results/demo
	$(VENV)/bin/python raytune_bayesian.py --model demo/model --dataset demo/squad \
		--max_t 16 --num_train_epochs 0.7 --max_eval_samples 200 --run_name demo

demo-data: $(READY)
	$(VENV)/bin/python demo/make_demo.py

test: $(READY)
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

$(READY): requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
