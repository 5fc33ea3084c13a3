# make demo   install into .venv, then make a talking video
# make test   the same, then the whole test suite
# make torture  kill conversions, preparations and training at random moments, make known mistakes; 1 GB of disk
# make lint   style, types, layering, generated documents
# make clean  remove .venv

PYTHON ?= python3
VENV := .venv
OUT := demo.mp4
PYTEST_ARGS :=

bin := $(VENV)/bin
installed := $(VENV)/installed

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(installed)
	$(bin)/avatarctl demo --out "$(OUT)" --overwrite
	@$(bin)/python -c 'import pathlib, sys; print("\nYour video:", pathlib.Path(sys.argv[1]).resolve())' "$(OUT)"
	@echo 'Now your own voice:'
	@echo '  $(bin)/avatarctl demo --audio VOICE.wav --out talking.mp4'
	@echo 'Your own image needs a published model: see README.md.'

test: demo
	$(bin)/python -m pytest $(PYTEST_ARGS)

lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/python docs/generate.py --check

# The stamp is the last thing written: an installation that was cut short starts again.
$(installed): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=/path/to/python names it")'
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(bin)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV)

# The figures of docs/benchmarks.md; about two hours on two idle cores.
BENCHES := help_cpu start_cpu memory_against_length outside_networks audio_windows demo_time convert_speed load_time \
	stableavatar_work batched_branches cpu_convolution prepare_work face_tracking training_work training_memory \
	plans_that_fit learning build_time decoder_gradient savings_time memory_modes counted_and_measured preset_memory
.PHONY: bench
bench: $(installed)
	@for name in $(BENCHES); do $(bin)/python tests/bench/$$name.py || exit 1; done
	@$(bin)/python tests/bench/counted_and_measured.py large

# What `make test` tries two or three times, here many times over.
TORTURES := kill_convert kill_prepare kill_training kill_build sharded_training training_mutations \
	memory_mutations demo_mutations profile_mutations repeats
.PHONY: torture
torture: $(installed)
	@for name in $(TORTURES); do $(bin)/python tests/torture/$$name.py || exit 1; done
