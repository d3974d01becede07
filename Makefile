# Each target makes its own virtual environment in .venv; nothing has to be installed first.
PYTHON ?= python3
BIN := .venv/bin
# A SoundFont player; TimGM6mb.sf2, 128 sampled instruments, which is all that is used of its package; espeak-ng.
SOUNDS := tinysoundfont==0.3.7 pretty_midi==0.2.11.post0 espeakng-loader==0.2.4

.PHONY: demo test test-gpu mutants lint clean

demo: .venv/sounds
	$(BIN)/python launch/demo.py

test: .venv/sounds .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Do the tests notice faults? About ten minutes; prints which test noticed each, and fails if none did.
mutants: .venv/test
	$(BIN)/python -m tests.mutants

# What only a GPU can show; without one it says so and fails.
test-gpu: .venv/test
	$(BIN)/python -m tests.gpu

lint: .venv/test build/types/hark
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy -p hark

# The packages as they are imported: mypy does not know package_dir of setup.cfg.
build/types/hark:
	mkdir -p $@
	ln -s $(CURDIR)/hark/__init__.py $(addprefix $(CURDIR)/,data grpo launch models) $@

# On Linux without an NVIDIA driver, the CPU build of torch where the installer finds one: the default build brings
# gigabytes of CUDA libraries that could not be used. Whatever is installed then satisfies setup.cfg.
.venv/installed: setup.cfg
	$(PYTHON) -m venv .venv
	if [ "$$(uname)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && [ ! -e /dev/dxg ]; then \
		$(BIN)/pip install -q "torch==2.13.0+cpu" 2>/dev/null \
		|| $(BIN)/pip install -q --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 2>/dev/null \
		|| $(BIN)/pip install -q torch==2.13.0; \
	fi
	$(BIN)/pip install -q -e .
	touch $@

# Real sounds for the demo's dataset. Not as extras of setup.cfg, because they must come without their own dependencies:
# those serve live output, for which PyAudio wants a C library, and MIDI files.
.venv/sounds: .venv/installed
	for package in $(SOUNDS); do \
		$(BIN)/pip install -q --no-deps $$package || echo "no $$package for this machine: built without it"; \
	done
	touch $@

.venv/test: .venv/installed
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
