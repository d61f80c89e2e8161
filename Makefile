# `make` lists the targets. PYTHON picks the interpreter, TORCH_INDEX another package index for torch (a CPU-only build).
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := modelathe optimize serve loadtest tests examples benchmarks docs
REPOSITORY := build/model_repository

.DEFAULT_GOAL := help
.PHONY: help machine server demo docs test exhaustive kills modules coverage check bench bench-compress bench-serve bench-loadtest bench-tune bench-gpu bench-tensorrt bench-ruler zoo refresh-model-repository clean

help: machine  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 34

# tritonserver's backend process is linked against libpython, which Debian's Python itself does not need.
LIBPYTHON = import os, sys, sysconfig as s; n = "libpython%d.%d.so.1.0" % sys.version_info[:2]; \
	d = [s.get_config_var("LIBDIR"), s.get_config_var("LIBPL"), "/usr/lib/%s" % s.get_config_var("MULTIARCH"), "/usr/lib"]; \
	any(os.path.exists(os.path.join(str(f), n)) for f in d) or print(n[:-7])

machine:
	@if [ -z "$(PYTHON)" ]; then missing="python3 python3-venv libpython3-dev"; else \
		$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
			missing="$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
		missing="$$missing $$($(PYTHON) -c '$(LIBPYTHON)')"; fi; \
	if [ -n "$$(echo $$missing)" ]; then \
		echo "this machine lacks something; install it with: sudo apt-get install -y" $$missing; exit 1; fi

# KServe's SDK pins older libraries than ours, and no Python package has the types of the Gateway API: their files are kept
# for the tests to read, not installed. Without npm the test of the second is left out, and says so.
$(READY): pyproject.toml constraints.txt | machine
	@$(PYTHON) -c 'import sys; sys.exit(sys.platform != "linux")' || { echo "modelathe is tested on Linux only"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install -c constraints.txt -e '.[all,tensorrt,examples,docs,dev]'
	$(BIN)/pip download --no-deps --dest $(VENV)/schemas kserve==0.21.0
	-cd $(VENV)/schemas && npm pack --silent @kubernetes-models/gateway-api@0.5.1
	@touch $@

server: $(READY)
	@$(BIN)/serve install

demo: server  ## the main job on the digits workload, proven on a real server, into build/model_repository
	$(BIN)/optimize run examples/digits_cnn.py:workload --recipe examples/digits_cnn.toml --repository $(REPOSITORY)

docs: $(READY)  ## the documentation into build/docs, links and anchors checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

test: server  ## the tests, the real server included
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

exhaustive: server  ## what `make test` holds a sample of: every page played, every example of --help, two of the zoo
	OMP_NUM_THREADS=1 $(BIN)/pytest -m exhaustive

kills: server  ## kill `optimize run` and `serve promote` at 50 random moments each; the next command must put it right
	KILLS=50 $(BIN)/pytest tests/optimize/runs/test_kills.py tests/serve/rollout/test_kill.py

modules: server  ## export, save and load 300 modules that hypothesis builds: each answers right or is refused in one line
	MODULES=300 $(BIN)/pytest tests/optimize/methods/export/test_any_module.py

coverage: server  ## how often the 95 % interval of `loadtest capacity` holds the truth, 40 simulated searches a case
	COVERAGE=40 $(BIN)/pytest tests/loadtest/probing/test_capacity.py -s -k nine_of_ten

check: server  ## lint, types and the fast tests
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/pytest -m 'not slow and not exhaustive'

bench: server  ## both workloads, and the figures that docs/figures.md quotes
	$(BIN)/python benchmarks/main_job.py

# The peers' servers in environments of their own.
PEERS := $(patsubst benchmarks/peer_servers/%.txt,.venv-servers/%/.ready,$(wildcard benchmarks/peer_servers/*.txt))
.venv-servers/%/.ready: benchmarks/peer_servers/%.txt | machine
	$(PYTHON) -m venv .venv-servers/$*
	.venv-servers/$*/bin/pip install -r $<
	@touch $@

bench-serve: server $(PEERS)  ## what an application sees while versions change, processes die, time passes; and at the peers'
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/serving_peers.py

# perf_analyzer is inside an old wheel of the client library; it is unpacked, not installed.
PERF := .venv-peers/perf_analyzer
$(PERF)/.ready: $(READY)
	$(BIN)/pip download --no-deps -d $(PERF) tritonclient==2.50.0 nvidia-cuda-runtime-cu12==12.9.79
	cd $(PERF) && for wheel in *.whl; do $(CURDIR)/$(BIN)/python -m zipfile -e $$wheel .; done
	chmod +x $(PERF)/*/data/bin/perf_analyzer
	@if ldd $(PERF)/*/data/bin/perf_analyzer | grep -q 'libb64.*not found'; then \
		echo "this machine lacks something; install it with: sudo apt-get install -y libb64-0d"; exit 1; fi
	@touch $@

bench-loadtest: server $(PERF)/.ready  ## our load generator beside perf_analyzer; NAMES="stall" for some parts
	PYTHONPATH=. $(BIN)/python benchmarks/load.py $(NAMES)

# The tuner that ours stands beside, in an environment of its own.
.venv-tuners/.ready: | machine
	$(PYTHON) -m venv .venv-tuners
	.venv-tuners/bin/pip install 'triton-model-analyzer==1.58.0'
	@touch $@

bench-tune: server $(PERF)/.ready .venv-tuners/.ready  ## serve tune, plan and their simulation beside the live server; PARTS="--part lanes"
	PYTHONPATH=. $(BIN)/python benchmarks/tune.py $(PARTS)

bench-gpu: $(READY)  ## MiniLM and ResNet-50 batched on a GPU, served and in process; without a GPU it says so
	$(BIN)/python benchmarks/gpu.py

# ModelOpt's ONNX part wants another ONNX Runtime.
.venv-modelopt/.ready: | machine
	$(PYTHON) -m venv .venv-modelopt
	.venv-modelopt/bin/pip install 'torch==2.13.0' 'nvidia-modelopt[onnx]==0.47.0' requests
	@touch $@

bench-tensorrt: $(READY) .venv-modelopt/.ready  ## every example in every precision through NVIDIA's compiler; NAMES="gru" for some
	$(BIN)/python benchmarks/matrix.py $(NAMES)

bench-ruler: $(READY)  ## what the ruler of speed says of a file against itself, idle and beside busy loops
	$(BIN)/python benchmarks/ruler.py

zoo: server  ## every example architecture through its recipe to an endpoint; NAMES="mlp lstm" runs some of them
	$(BIN)/python benchmarks/zoo.py $(NAMES)

# Olive in an environment of its own that sees ours: what it pins reaches nobody else.
.venv-peers/.ready: $(READY)
	$(PYTHON) -m venv .venv-peers
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
	.venv-peers/bin/pip install -c constraints.txt 'olive-ai==0.13.0' requests
	@touch $@

bench-compress: $(READY) .venv-peers/.ready  ## our compression beside the peers'; NAMES="resnet" for some subjects
	PYTHONPATH=. $(BIN)/python benchmarks/compress.py $(NAMES)

refresh-model-repository: server  ## make the committed small model again
	rm -rf model_repository/digits_cnn && $(BIN)/optimize run examples/digits_cnn.py:workload \
		--recipe examples/digits_cnn.toml --repository model_repository

clean:  ## remove what was built; the environments stay
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
