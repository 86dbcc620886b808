# `make repro` and `make test` do everything; see README.md.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# As `cryo run` has them: stages run several processes side by side, whose threads must not wait for each other.
export OMP_WAIT_POLICY := PASSIVE
export OPENBLAS_NUM_THREADS := 1
unexport PYTHONDONTWRITEBYTECODE  # packages are installed without

.PHONY: setup scm repro gpu test bench topaz cryodrgn reliability book strip lab clean

setup: $(VENV)/.ready

# Packages several at a time, as pip unpacks on one core, the largest (torch) early; then what the lock does not name.
# What is imported is compiled as it is imported, and kept.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 expected, got {v[0]}.{v[1]}: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	grep == requirements.lock | sort -r | xargs -P 3 -n 29 $(VENV)/bin/pip install --quiet --no-compile --no-deps
	$(VENV)/bin/pip check >/dev/null || $(VENV)/bin/pip install --quiet -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# DVC expects a Git repository, which an unpacked archive is not, unless it is told.
scm: setup
	@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --local core.no_scm true

# DVC makes one stage at a time, most of which keep one core busy. Here lines of stages that share no file go side by
# side, each by a DVC that waits for the others' lock; then `dvc repro` makes what is left, or says why it cannot.
SIDE_BY_SIDE := xargs -P 3 -I{} sh -c 'dvc --wait-for-lock repro --single-item {}'
FIRST := 'structures projections' 'particles pairs'
SECOND := 'train_particles evaluate_particles denoise reconstruct_particles figure4 weights train' \
  'posterior classes screening baselines'
THIRD := 'evaluate table1 figure1 figure3a figure3eg evaluate_supplement scores lambda adversary architectures \
  protocols robustness answer' 'export reconstruct relion figure3bd figure3hj' \
  'assign conformations criteria junk noises figure2 figure5'

repro: scm
	@python -m cryo_lib.paper.experiments
	@python -m cryo_lib.paper.machine
	@dvc repro nbsrc
	@printf '%s\n' $(FIRST) | $(SIDE_BY_SIDE) && printf '%s\n' $(SECOND) | $(SIDE_BY_SIDE) && \
	  printf '%s\n' $(THIRD) | $(SIDE_BY_SIDE) || true
	dvc repro
	@python -m cryo_lib.paper.report
	@cryo report

# Trainings of the scale in params.yaml on one GPU, WORKERS at a time, for MINUTES; each call goes on where the last one
# stopped.
MINUTES ?= 9
WORKERS ?= 1
ORDER ?= 'table1/*/seed0' 'contamination/*/awgn-0.1-A_0.3/seed0' 'table1/*' 'contamination/*' 'clipped/*' 'halves/*'
gpu: scm
	dvc repro projections
	python -m cryo_lib.paper.cluster train --minutes $(MINUTES) --workers $(WORKERS) $(ORDER)

test: setup
	ruff check --quiet . && ruff format --quiet --check .
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

bench: setup
	@$(MAKE) --silent topaz || echo "Topaz-Denoise could not be installed: its row will say so"
	python -m benchmarks
	python -m benchmarks.parts

# Topaz-Denoise (GPL-3.0), which notebook 44 and `make bench` compare with: in a folder of its own, and no dependency.
# What it imports is here already, but for h5py.
topaz: build/topaz/topaz

build/topaz/topaz: | setup
	pip install --quiet --no-deps --target build/topaz topaz-em==0.3.20 h5py==3.16.0

# cryoDRGN (GPL-3.0), which notebook 43 hands our stacks to: in an environment of its own, and no dependency.
cryodrgn:
	$(PYTHON) -m venv build/cryodrgn
	build/cryodrgn/bin/pip install --quiet torch==2.13.0
	build/cryodrgn/bin/pip install --quiet cryodrgn==4.3.1

# Bad inputs, tried one by one: docs/reliability.md says what each of them says.
reliability: setup
	python -m benchmarks.reliability

# One site of the executed notebooks of the scale in params.yaml, to be read without a server: build/book/index.html.
book: setup
	python -m cryo_lib.paper.book

# Notebooks as they are committed: without outputs and what editors add.
strip: setup
	nbstripout --keep-id --extra-keys "$(addprefix metadata.language_info.,codemirror_mode file_extension mimetype \
		nbconvert_exporter pygments_lexer version) $(addprefix cell.metadata.,editable jupyter slideshow)" notebooks/*.ipynb

lab: setup
	jupyter lab

clean:
	rm -rf build executed .scratch
