# `make demo` and `make test` need only Python 3.10 to 3.13 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py sgalign_command.py constraints.txt $(shell find csrc kernels sgalign -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.json')
DATA ?=

.PHONY: demo test test-all reproduce-small lint docs benchmark fuzz kill soak doctor wheel clean

# Two epochs show the difference to the frequency baseline. A second thread would not speed up such small models.
demo: $(VENV)/train
	@echo '== Training Motifs and Align-Motifs$(if $(DATA),, for one or two minutes)'
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/sgalign compare $(if $(DATA),--data '$(DATA)',--epochs 2)

# Two processes with one thread each. With more threads, the threads of the two processes would wait for each other.
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-all: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "slow or not slow"

# All experiments of the paper at a very small size, to see that every step works. docs/reproduce.md has the real ones.
reproduce-small: $(VENV)/train
	SGALIGN=$(BIN)/sgalign examples/reproduce_small.sh $(or $(OUT),reproduction-small)

benchmark: $(VENV)/test
	$(BIN)/pytest benchmarks/ --benchmark-only

# The campaigns that docs/reliability.md describes. Each takes an hour or more.
fuzz: $(VENV)/test
	for campaign in datasets files core commands; do \
		OMP_NUM_THREADS=1 $(BIN)/python tests/campaigns/fuzz_$$campaign.py --out build/fuzz/$$campaign || failed=1; \
	done; exit $${failed:-0}

kill: $(VENV)/test
	for campaign in kills disks; do \
		OMP_NUM_THREADS=1 $(BIN)/python tests/campaigns/$$campaign.py || failed=1; \
	done; exit $${failed:-0}

soak: $(VENV)/test
	for campaign in side_by_side soak; do \
		OMP_NUM_THREADS=1 $(BIN)/python tests/campaigns/$$campaign.py || failed=1; \
	done; exit $${failed:-0}

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd $(VENV) && bin/lint-imports --no-logo $(CURDIR)/pyproject.toml  # checks the installed package, including kernels/
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

# With --quiet, mkdocs would not count the warnings that --strict forbids. Its output is shown only if it fails.
docs: $(VENV)/docs
	@mkdir -p build
	@$(BIN)/mkdocs build --strict >build/site.log 2>&1 || { cat build/site.log; exit 1; }
	@echo "The site is in build/site/index.html"

doctor: $(VENV)/train
	$(BIN)/sgalign doctor

# The source archive, and from it the wheel of this Python without CUDA kernels. Each is then installed and tried in an
# empty environment. docs/release.md describes the other wheels. torch brings its own libgomp (docs/release.md), so the
# wheel must not bring another one. TRIAL names the file with the versions for the environments, torch's among them.
TRIAL ?= constraints.txt
wheel: export SGALIGN_CUDA := 0
wheel: $(VENV)/release
	rm -rf dist build/wheel
	$(BIN)/python -m build --sdist --outdir dist
	$(BIN)/pip wheel --no-deps --wheel-dir build/wheel dist/sgalign-*.tar.gz
	PATH='$(abspath $(BIN))':"$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	$(BIN)/twine check --strict dist/*
	for package in dist/*; do \
		rm -rf build/empty && $(PYTHON) -m venv build/empty && \
		build/empty/bin/pip install --quiet --constraint '$(TRIAL)' "$$package" && \
		build/empty/bin/python -I tests/try_installed.py || exit 1; \
	done
	rm -rf build/empty
	@ls -l dist

# Each of these stamp files stands for one set of extras. After a source has changed, `make` installs the package again.
comma := ,
$(VENV)/train $(VENV)/test $(VENV)/lint: $(SOURCES) | $(VENV)/bin/pip
	rm -rf build/lib*  # otherwise this folder would keep modules that have moved
	@echo '== Installing sgalign with the packages of [$(EXTRAS)] in $(VENV). The first time, pip downloads about 3 GB,'
	@echo '== and then compiles and unpacks for some minutes.$(if $(filter 0,$(SGALIGN_CUDA)), It leaves out the CUDA kernels.)'
	$(BIN)/pip install $(PIP_OPTIONS) --constraint constraints.txt '.[$(EXTRAS)]'
	cd $(VENV) && touch $(subst $(comma), ,$(EXTRAS))
# Training can use the CUDA kernels only on a GPU. They take several minutes to compile.
$(VENV)/train: export SGALIGN_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,0)
$(VENV)/train: EXTRAS := train
# Python compiles the modules that the demo imports. Compiling all installed modules would take longer.
$(VENV)/train: PIP_OPTIONS := --no-compile
$(VENV)/test: EXTRAS := train,test
$(VENV)/lint: EXTRAS := train,test,lint

# The site is built from the sources, so it needs neither the package nor torch.
$(VENV)/docs: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --constraint constraints.txt --group docs
	touch $@

$(VENV)/release: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --constraint constraints.txt --group release
	touch $@

$(VENV)/bin/pip:
	@echo '== Making a virtual environment in $(VENV)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

clean:
	rm -rf build dist $(VENV) sgalign/_C.*.so *.egg-info
