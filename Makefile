# make setup   the environment in .venv, with everything that demo and tests need
# make demo    the main job: trains a small teacher, compresses it, exports it (minutes)
# make test    all tests
# make bench   speed and memory against references, as ratios
# make paper   toy-scale counterparts of the papers' claims, several seeds (slow)
# make gpu     checks and measurements on a GPU

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# bytecode makes every import twice as fast; some systems switch it off
unexport PYTHONDONTWRITEBYTECODE
export PREFECT_HOME := $(CURDIR)/.prefect/3.8
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120
export DO_NOT_TRACK := 1

.PHONY: setup demo test bench paper gpu docs clean

setup: $(VENV)/.done

$(VENV)/.done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q -e ".[test]"
	mkdir -p $(PREFECT_HOME)
	$(BIN)/prefect server database reset -y >/dev/null
	touch $@

demo: setup
	$(BIN)/minitron run --config-name demo

test: setup
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m benchmarks.score
	$(BIN)/python -m benchmarks.prune
	$(BIN)/python -m benchmarks.distill

paper: setup
	$(BIN)/python -m benchmarks.paper

gpu: setup
	$(BIN)/python -m benchmarks.gpu

docs: setup
	$(BIN)/python -m nemo_minitron.stages.config > docs/configuration.md

clean:
	rm -rf $(VENV) .prefect build *.egg-info
