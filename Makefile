# make demo    train a physics-informed network on two ranks with three solvers, 45 s in all, draw the figures
# make check   a part of the test suite, before a commit (2 minutes)
# make slurm-test  the batch scripts on a Slurm of two virtual nodes of its own (installs Debian's packages, 3 minutes)
# make test    the test suite, on 1, 2 and 3 ranks (about 12 minutes on two cores); make test-long all of it on all ranks, 1,000 kills
# make bench   the tables of the README, measured side by side (about 25 minutes)
# make gpu     try a GPU: numbers, copies, two ranks on one card, times (GPU= has options of drivers/gpu.py)
# make lint    style and types
# make docs    docs/options.md from the tables of options, and the site in build/site, with the gallery's figures (2 minutes)
# Each of them makes .venv first (make env), see environment.sh; make gpu GPU_PYTHON=python3 takes that interpreter as it
# is, on a machine without network, say.

PYTHON_ENV = .venv/bin/python
# for each of the three solvers
DEMO_SECONDS ?= 15
BENCH ?=
GPU ?=
GPU_PYTHON ?=
MPIEXEC = mpiexec --oversubscribe $(shell [ "$$(id -u)" = 0 ] && echo --allow-run-as-root)
# what was compiled once is kept: without that each start of a driver or of the tests compiles what it imports again
unexport PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1
# more ranks than cores take turns
export OMPI_MCA_mpi_yield_when_idle = 1
# of programs that mpiexec starts side by side each would have the first core
export OMPI_MCA_hwloc_base_binding_policy = none

.PHONY: env demo check check-solvers check-rest check-drivers check-three test test-long test-one test-drivers test-pages test-three test-two test-slurm slurm-test bench gpu lint docs clean

env:
	@./environment.sh

demo: env
	@mkdir -p out
	for solver in ssbroyden mspqn lbfgs; do \
	    $(MPIEXEC) -n 2 $(PYTHON_ENV) -m mpi4py drivers/pinn.py -problem burgers -points 5000 -solver $$solver \
	        $$([ $$solver = mspqn ] && echo -local_steps 20 || echo -error_interval 10 -progress none) \
	        -max_it 100000 -max_time $(DEMO_SECONDS) -output out/$$solver.h5 -overwrite || exit 1; \
	done
	$(PYTHON_ENV) drivers/plot.py out/ssbroyden.h5 out/mspqn.h5 out/lbfgs.h5 -labels SSBroyden MSPQN L-BFGS -o out/demo.png
	@echo "run files out/*.h5, to be resumed with -restart; figures out/demo.png and out/demo.maps.png"

check: env build/yield.so
	$(MAKE) -j4 check-solvers check-rest check-drivers check-three

check-solvers check-drivers:
	$(PYTHON_ENV) -m pytest tests/$(@:check-%=%) --suite=check

check-rest:
	$(PYTHON_ENV) -m pytest tests --suite=check --ignore=tests/solvers --ignore=tests/drivers

check-three:
	$(MPIEXEC) -n 3 $(PYTHON_ENV) -m pytest tests --suite=check

# ranks that wait sleep (not where a blank in the path would end a name): three ranks of solvers beside another process
# took 60 s instead of 131
test-one test-drivers test-pages test-three test-two test-slurm check-solvers check-rest check-drivers check-three: export LD_PRELOAD = $(if $(word 2,$(CURDIR)),,$(wildcard $(CURDIR)/build/yield.so))

build/yield.so: tests/yield.c
	mkdir -p build
	-$(CC) -O2 -shared -fPIC $< -o $@

# the suites and what they run on each number of ranks: tests/suites.py; three at a time, the longest first but for what
# waits most of the time: with four more time goes into taking turns
test: env build/yield.so
	$(MAKE) -j3 test-slurm test-three test-one test-drivers test-pages test-two

test-long: export DDML_LONG = 1
test-long: export DDML_KILLS = 1000
test-long: env build/yield.so
	$(MAKE) -j3 test-slurm test-three test-one test-drivers test-pages test-two

test-one:
	$(PYTHON_ENV) -m pytest tests -rs --ignore=tests/drivers

test-drivers: # it waits for what it starts half of the time
	$(PYTHON_ENV) -m pytest tests/drivers -rs --ignore=tests/drivers/test_slurm.py --ignore=tests/drivers/test_readme.py

test-pages: # the commands and programs of the README and of docs/
	$(PYTHON_ENV) -m pytest tests/drivers/test_readme.py -rs

test-slurm: # it waits for Slurm most of the time
	$(PYTHON_ENV) -m pytest tests/drivers/test_slurm.py -rs

test-three:
	$(MPIEXEC) -n 3 $(PYTHON_ENV) -m pytest tests

test-two:
	$(MPIEXEC) -n 2 $(PYTHON_ENV) -m pytest tests

slurm-test: env test-slurm

bench: env
	$(PYTHON_ENV) drivers/bench.py $(BENCH)

gpu: $(if $(GPU_PYTHON),,env)
	$(or $(GPU_PYTHON),$(PYTHON_ENV)) drivers/gpu.py $(GPU)

lint: env
	$(PYTHON_ENV) -m ruff check .
	$(PYTHON_ENV) -m ruff format --check .
	$(PYTHON_ENV) -m mypy

docs: export OMPI_ALLOW_RUN_AS_ROOT = 1
docs: export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
docs: export OMPI_MCA_rmaps_base_oversubscribe = 1
docs: export NO_MKDOCS_2_WARNING = 1
docs: env build/docs/.ready
	$(PYTHON_ENV) drivers/document.py > docs/options.new
	mv docs/options.new docs/options.md
	rm -rf build/gallery && mkdir -p build/gallery
	cd build/gallery && for script in ../../docs/gallery/*.py; do \
	    ../../$(PYTHON_ENV) $$script > $$(basename $$script .py).txt || exit 1; \
	done
	build/docs/bin/mkdocs build --strict
	build/docs/bin/cffconvert --validate

build/docs/.ready: docs/requirements.txt
	rm -rf build/docs
	$(PYTHON_ENV) -m venv build/docs
	build/docs/bin/python -m pip -q -q --disable-pip-version-check install -r docs/requirements.txt
	touch $@

clean:
	rm -rf .venv out build *.egg-info
