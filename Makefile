# make            the environment                make oracle   agreement with torch and transformers
# make demo       small Llama 4s write and see   make newest   main tests on the newest jax
# make check      lint and the quickest tests    make bench    speed on this CPU
# make test       each part of the code          make lock     newest versions into requirements/
# make test-slow  the tests that take longer     make clean    removes what was built
# make lint       style, types, architecture
#
# Settable, as in `make VENV=/tmp/venv test`: PYTHON and ORACLE_PYTHON (which build the environments),
# VENV, VENV_ORACLE, VENV_NEWEST, BUILD.

VENV = .venv
VENV_ORACLE = .venv-oracle
VENV_NEWEST = .venv-newest
BUILD = build

# The last PEFT before the two sides of experts' adapters were swapped; requirements/ has a newer one.
older_peft = 0.18.1
picture = demo/vision/held-out/2x2.png
python = $(VENV)/bin/python
in_parallel = --numprocesses 2 --dist worksteal --durations 25 --durations-min 10
newest_tests = tests/model/test_golden.py tests/generate/test_engine.py tests/train/test_trainer.py \
    tests/checkpoint/test_convert.py tests/checkpoint/test_refused_sources.py tests/checkpoint/test_formats.py
slow = slow or absent_gpu or absent_tpu
quick_tests = tests/test_mesh_config.py tests/test_errors.py tests/test_parsing.py tests/test_hf_config.py \
    tests/test_reference.py tests/test_patches.py tests/eval/test_needle.py tests/checkpoint/test_names.py tests/model/test_layers.py \
    tests/scripts/test_main.py tests/text/test_chat.py
ORACLE_SEED := $(or $(JAXMOE_ORACLE_SEED),$(shell date +%s))
with_oracle = JAXMOE_ORACLE_PYTHON="$(abspath $(VENV_ORACLE))/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: venv demo check test test-slow lint oracle newest bench lock clean
.DEFAULT_GOAL = venv

venv: $(VENV)/.project

demo: $(VENV)/.project $(BUILD)/demo.converted $(BUILD)/demo-vision.converted
	$(python) scripts/generate.py $(BUILD)/demo --prompt "In the beginning" \
	    --mesh expert=4,sequence=2 --cpu-devices 8 --max-new-tokens 120 --temperature 0.8
	@echo "A picture: $(picture)"
	@$(python) scripts/generate.py $(BUILD)/demo-vision --chat --image $(picture) \
	    --prompt "What is written?" --temperature 0 --max-new-tokens 20

check: lint
	$(python) -m pytest -m "not ($(slow))" $(in_parallel) $(quick_tests)

test: $(VENV)/.project
	$(python) -m pytest -m "not oracle and not ($(slow))" $(in_parallel)

test-slow: $(VENV)/.project
	$(python) -m pytest -m "not oracle and ($(slow))" $(in_parallel)

lint: $(VENV)/.project
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m pyrefly check --python-interpreter-path $(python)
	$(VENV)/bin/lint-imports --no-cache

oracle: $(VENV)/.project $(VENV_ORACLE)/.locked
	@echo "JAXMOE_ORACLE_SEED=$(ORACLE_SEED)"
	@$(with_oracle) JAXMOE_ORACLE_SEED=$(ORACLE_SEED) JAXMOE_FULL_COMPILATION=1 $(python) -m pytest -m oracle --numprocesses 2

newest: $(VENV_NEWEST)/.project
	$(VENV_NEWEST)/bin/python -m pytest $(in_parallel) $(newest_tests)

bench: $(VENV)/.project $(VENV_ORACLE)/.locked
	$(with_oracle) $(python) scripts/benchmark.py cpu
	$(with_oracle) $(python) scripts/benchmark.py vision
	$(with_oracle) $(python) scripts/benchmark.py train

lock:
	.ci/lock $(BUILD)

clean:
	rm -rf $(BUILD) .pytest_cache .ruff_cache *.egg-info

# The stamps below are written last, so that an interrupted step is done again.

converters = $(wildcard jaxmoe/checkpoint/*.py jaxmoe/checkpoint/*/*.py)
$(BUILD)/demo.converted: $(wildcard demo/model/*)
$(BUILD)/demo-vision.converted: $(wildcard demo/vision/model/*)
$(BUILD)/demo.converted: source = demo/model
$(BUILD)/demo-vision.converted: source = demo/vision/model
$(BUILD)/demo.converted $(BUILD)/demo-vision.converted: %.converted: $(converters) | $(VENV)/.project
	rm -rf $* $@
	mkdir -p $(BUILD)
	$(python) scripts/convert.py $(source) $*
	touch $@

# new_venv(folder, variable, oldest, newest): an empty environment; an earlier one is cleared, so
# that nothing but the lock is in it.
new_venv = python=$$(.ci/find-python $2 $3 $4) && \
    "$$python" -m venv $$(test ! -e $1/pyvenv.cfg || echo --clear) $1

$(VENV)/.locked: requirements/dev.lock
$(VENV_NEWEST)/.locked: requirements/newest.lock
$(VENV)/.locked $(VENV_NEWEST)/.locked:
	@$(call new_venv,$(@D),PYTHON,3.12,3.14)
	@echo "Installing $< into $(@D): up to 2 GB, once."
	@$(@D)/bin/python -m pip install --quiet --require-hashes --requirement $<
	@touch $@

$(VENV)/.project $(VENV_NEWEST)/.project: %/.project: %/.locked pyproject.toml $(wildcard */__init__.py)
	@$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV_ORACLE)/.locked: requirements/oracle.lock
	@$(call new_venv,$(VENV_ORACLE),ORACLE_PYTHON,3.11,3.14)
	@echo "Installing $< into $(VENV_ORACLE): torch and transformers, once."
	@$(VENV_ORACLE)/bin/python -m pip install --quiet --requirement $<
	@$(VENV_ORACLE)/bin/python -m pip install --quiet --no-deps peft==$(older_peft) \
	    --target $(VENV_ORACLE)/peft-$(older_peft)
	@touch $@
