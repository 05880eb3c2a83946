# What this needs: Python 3.11 and make. Everything else goes into .venv and device_runtime/web/node_modules.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder
unexport PYTHONDONTWRITEBYTECODE # every start of a command would compile all modules again
PIP := --quiet --disable-pip-version-check --no-compile # what is imported gets compiled then, by both cores

.PHONY: test slow lint types tests built tried web page wheel phone docs versions versions-quick demo bench bench-quick zoo-check attacks report figures kills fuzz fleet pi pi-board pi-32 format clean
.DELETE_ON_ERROR:

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP) -c constraints.txt torch
	$(BIN)/python -m pip install $(PIP) -c constraints.txt -e '.[dev]'
	touch $@

test:  ## formatting, lint, strict types, the tests but for the slow ones, the wheel outside the checkout; two jobs at a time
	$(MAKE) --jobs=2 --output-sync=line lint types tests tried

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/ready
	$(BIN)/mypy

tests: web | built # which writes the metadata that tests read
	$(PYTEST) -m "not slow"

slow: web | built  ## the slow tests: pages of the docs as printed, the zoo in both engines, fleets, kills, benchmarks
	$(PYTEST) -m slow

built: $(VENV)/ready  ## the wheel without the phone's page, in .venv/wheel, for what tries it elsewhere
	rm -rf $(VENV)/wheel
	$(BIN)/python -m build --quiet --wheel --outdir $(VENV)/wheel .

tried: built
	sh tests/try_wheel.sh $(BIN)/python $(VENV)/wheel

web: $(VENV)/ready  ## the packages of the phone's page, which are pinned by their lockfile
	sh tests/phone/install.sh $(BIN)/python

page: web  ## the phone's page for any web server, in build/page, with its files in brotli and gzip beside them
	PATH="$(abspath $(BIN)):$$PATH" node device_runtime/web/build.mjs build/page --compress

wheel: web  ## the wheel with the phone's page in it, for servers that phones join, in dist/
	rm -rf device_runtime/web/page
	PATH="$(abspath $(BIN)):$$PATH" node device_runtime/web/build.mjs device_runtime/web/page --compress
	$(BIN)/python -m build --quiet --wheel --outdir dist .

phone: web  ## rounds of two emulated phones in Chromium, what goes wrong on phones, and the operator's page
	CHROMIUM=$$(sh tests/phone/browser.sh) && export CHROMIUM && $(BIN)/python -m pytest -q tests/phone/*in_browser.py

docs: $(VENV)/ready  ## the documentation as a site, in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html

versions: built  ## the engine onnxruntime on Python 3.11 to 3.13 and onnxruntime 1.20 to the newest
	sh tests/try_versions.sh $(BIN)/python $(VENV)/wheel

versions-quick: built  ## one of these combinations, the first whose Python is here, in about a minute
	sh tests/try_versions.sh $(BIN)/python $(VENV)/wheel quick

demo: $(VENV)/ready  ## FedPara, dense and low-rank on real images, through the commands a user types
	$(BIN)/fedpara-edge demo

bench: $(VENV)/ready  ## the numbers of the README, to benchmarks/results.md, from where it stopped; BENCH=--again for all
	$(BIN)/python benchmarks/run.py $(BENCH)

bench-quick: $(VENV)/ready  ## the same benchmarks at small sizes, in less than 5 minutes, to benchmarks/.kept/quick.md
	$(BIN)/python benchmarks/run.py --quick --again $(BENCH)

zoo-check: $(VENV)/ready  ## architectures exported and trained on 5 seeds, to benchmarks/zoo_check.md, from where it stopped
	$(BIN)/python benchmarks/zoo_check.py $(ZOO)

attacks: $(VENV)/ready  ## accuracy by rule and attack, to benchmarks/attacks.md, from where it stopped
	$(BIN)/python benchmarks/attacks.py --figure docs/attacks.svg $(ATTACKS)

report: $(VENV)/ready  ## page and figures of every run in plans/results, into build/reports/
	mkdir -p build/reports
	set -e; for run in plans/results/*; do \
	  $(BIN)/fedpara-edge report $$run -o build/reports/$$(basename $$run) --overwrite; done

figures: web  ## the figures of the documentation, drawn again from plans/results and by an emulated phone
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/screens.py

kills: $(VENV)/ready  ## every command that writes, killed in each call by which it changes a file, and on failing disks
	PYTHONPATH=.:tests $(BIN)/python tests/kills.py $(KILLS)

fuzz: $(VENV)/ready  ## 100,000 mutated files of each format: each reads as something consistent or is refused in one line
	PYTHONPATH=.:tests $(BIN)/python tests/fuzz.py $(FUZZ)

PI := $(VENV)/pi
PI_SUITE ?= bookworm
PI_64 := $(PI)/arm64-$(PI_SUITE)
PI_32 := $(PI)/armhf-trixie

pi: web built $(PI_64)/ready  ## rounds of two emulated Raspberry Pis, one with a MobileNet, one with a phone on a server; PI_SUITE=trixie for Debian 13
	sh tests/pi/install.sh $(PI_64) $(BIN)/python $(VENV)/wheel/*.whl -c constraints.txt
	$(BIN)/python tests/pi/emulated_round.py two-pis $(PI_64)
	PYTHONPATH=tests $(BIN)/python tests/pi/emulated_page.py $(PI_64)
	PYTHONPATH=tests $(BIN)/python tests/pi/emulated_serving.py $(PI_64)

fleet: built $(PI_64)/ready  ## a fleet on Flower, of a node on this machine and one on an emulated Raspberry Pi
	EXTRA=fleet sh tests/pi/install.sh $(PI_64) $(BIN)/python $(VENV)/wheel/*.whl -c constraints.txt
	$(BIN)/python tests/pi/emulated_fleet.py $(PI_64)

pi-board: built $(PI_64)/ready $(PI)/board/ready  ## training on a whole emulated Raspberry Pi 3, which boots for it
	sh tests/pi/install.sh $(PI_64) $(BIN)/python $(VENV)/wheel/*.whl -c constraints.txt
	$(BIN)/python tests/pi/emulated_round.py board $(PI_64) $(PI)/board

pi-32: built $(PI_32)/ready  ## training on an emulated 32-bit Raspberry Pi, whose onnxruntime and numpy are Debian's
	sh tests/pi/install.sh $(PI_32) $(BIN)/python $(VENV)/wheel/*.whl
	$(BIN)/python tests/pi/emulated_round.py pi $(PI_32)

$(PI_64)/ready: tests/pi/userland.sh tests/pi/debian.sh tests/pi/machines.sh
	sh tests/pi/userland.sh $(@D) arm64 $(PI_SUITE)
	touch $@

$(PI_32)/ready: tests/pi/userland.sh tests/pi/debian.sh tests/pi/machines.sh
	sh tests/pi/userland.sh $(@D) armhf trixie python3-onnxruntime python3-zstandard
	touch $@

$(PI)/board/ready: tests/pi/board.sh tests/pi/init tests/pi/debian.sh | $(PI_64)/ready
	sh tests/pi/board.sh $(@D) $(PI_64)
	touch $@

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist demo-run docs/_build *.egg-info benchmarks/.kept
