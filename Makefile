# make demo       train the digits demo and write its picture (OUT=docs/demo.png)
# make textbook   run docs/textbook.py and write docs/textbook.md and its pictures
# make test       run the tests, in a process for each processor (ARGS="-k packed" goes to pytest, "-n 0" makes it one)
# make bench      rnnkern.RNN against nn.RNN, JAX, ONNX Runtime, OpenVINO ... on this machine, in three minutes; GRID=ours,
#                 flashrnn, haste, flaggems, scaling (.venv/bin/rnnkern bench --list) is another grid, OUT_DIR where it goes
# make bench-scaling  time and memory against T, B, H, threads, with fitted exponents
# make bench-compare  EARLIER=file.json: the same grid again, compared by ratios; fails where something became slower
# make results    docs/results.md from the runs in benchmarks/results
# make bench-cpu  every size and mode on the CPU, fp32 and bf16, all peers, in one table; twenty minutes
# make bench-pytest  the same sizes in pytest-benchmark against torch.nn.RNN, and what only the kernels' authors ask: short
#                 sequences, both directions, layers, the share of the GEMM rate; the table goes to TABLE (build/bench-cpu.txt)
# make gpu-test   the tests of the GPU backends on the GPU that is here
# make gpu-bench  rnnkern.RNN against torch.nn.RNN on it; the results go to RESULTS (build/bench-gpu.json)
# make lint       ruff, mypy, clang-format: check only
# make format     let ruff and clang-format write
# make asan       the tests under AddressSanitizer; make ubsan: under UndefinedBehaviorSanitizer
# make clean      remove what was built; make distclean: .venv too
#
# Each makes .venv where it is missing, installs what it lacks (tools/venv.py) and builds. PYTHON is the Python that
# .venv is made from; where it has a torch >= 2.10, that torch is used.

PYTHON ?= python3
OUT ?= docs/demo.png
GRID ?= quick
OUT_DIR ?= benchmarks/results
TABLE ?= build/bench-cpu.txt
RESULTS ?= build/bench-gpu.json
ARGS ?=

RUN := .venv/bin/python
LIBRARY := rnnkern/_cpu.so
CXX_FILES := $(sort $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inc'))

# Programs of .venv are found first, those beside PYTHON last (ninja, where PYTHON is in a venv of its own).
export PATH := $(CURDIR)/.venv/bin:$(PATH):$(dir $(shell command -v $(PYTHON)))

.PHONY: demo textbook test bench bench-scaling bench-compare bench-cpu results bench-pytest gpu gpu-test gpu-bench lint format \
        asan ubsan clean distclean
.NOTPARALLEL:

demo: .venv/.stamp-demo $(LIBRARY) .venv/.stamp-install
	mkdir -p $(dir $(OUT))
	.venv/bin/rnnkern demo --out $(OUT)

textbook: .venv/.stamp-demo $(LIBRARY) .venv/.stamp-install
	OMP_NUM_THREADS=1 $(RUN) tools/weave.py docs/textbook.py

test: .venv/.stamp-test $(LIBRARY) .venv/.stamp-install
	$(RUN) -m pytest -n auto --dist worksteal $(ARGS)

bench bench-scaling: .venv/.stamp-bench .venv/.stamp-peers $(LIBRARY) .venv/.stamp-install
	$(RUN) -m rnnkern bench --grid $(GRID) --out $(OUT_DIR) $(ARGS)
bench-scaling: GRID = scaling

bench-compare: .venv/.stamp-bench .venv/.stamp-peers $(LIBRARY) .venv/.stamp-install
	$(RUN) -m rnnkern bench --compare $(EARLIER) --out build/bench $(ARGS)

bench-cpu: .venv/.stamp-bench .venv/.stamp-peers $(LIBRARY) .venv/.stamp-install
	$(RUN) -m rnnkern bench --device cpu --grid cpu --out $(OUT_DIR) $(ARGS)

results: .venv/.stamp-bench $(LIBRARY) .venv/.stamp-install
	$(RUN) benchmarks/page.py

bench-pytest: .venv/.stamp-bench $(LIBRARY) .venv/.stamp-install
	OMP_PROC_BIND=true $(RUN) -m pytest benchmarks/bench_cpu.py --benchmark-quiet --table $(TABLE) $(ARGS)

gpu: .venv/.stamp-test .venv/.stamp-bench $(LIBRARY) .venv/.stamp-install
	@$(RUN) -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU here'"

gpu-test: gpu
	RNNKERN_REQUIRE=triton $(RUN) -m pytest -k "triton or cuda" $(ARGS)

gpu-bench: gpu
	$(RUN) benchmarks/bench_gpu.py --out $(RESULTS) $(ARGS)

lint: .venv/.stamp-lint
	ruff format --check .
	ruff check .
	$(RUN) -m mypy
	clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/.stamp-lint
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

asan ubsan: .venv/.stamp-test .venv/.stamp-install
	tools/sanitize.sh $(if $(filter asan,$@),address,undefined) $(ARGS)

clean:
	rm -rf build dist *.egg-info rnnkern/*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

# venv.py writes the stamp where nothing lacks any more.
.venv/.stamp-%: pyproject.toml constraints.txt tools/venv.py
	$(PYTHON) tools/venv.py $*

# Compiles only what changed; the libraries land in rnnkern/.
$(LIBRARY): $(CXX_FILES) setup.py .venv/.stamp-build
	$(RUN) setup.py --quiet build_ext --inplace
	touch $@

# Makes .venv see rnnkern/ and gives it the entry point and the version.
.venv/.stamp-install: pyproject.toml setup.py .venv/.stamp-build | $(LIBRARY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable .
	touch $@
