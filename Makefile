# Every target sets up what it needs first; see scripts/environment.py. ARGS are passed on.
PYTHON ?= python3
RUN = @$(PYTHON) scripts/environment.py $(MEASURED)
BUILD ?= build
SGLANG_TESTS = sglang sglang_traces sglang_windows window_pools cross_engine latent_attention sage_sglang hicache_pools hicache

CARD_TESTS = card dashboard
FLEET_TESTS = manifests ray_serve

.PHONY: test-rdma test-carriers test-fleets ab performance report coverage demo test test-unit test-simulation test-wheel test-cpp test-card test-engines test-vllm test-sglang test-vendor-headers test-fuzz test-full fuzz faults two-links lint matrix bench device-check soak simulate mutate check-telemetry accuracy shell build wheel clean

# Two vLLM servers and a router on a small built-in model: what moved, and how fast.
# make demo ARGS="--engine sglang --json": the same with SGLang's.
demo:
	$(RUN) $(if $(findstring sglang,$(ARGS)),--sglang) sage-kvt demo $(ARGS)

# All but what is about speed or the wheel counts the lines that it runs; a table of them comes last.
test:
	@$(PYTHON) scripts/environment.py python -m scripts.coverage_table --reset
	$(MAKE) MEASURED=--measured test-unit
	$(MAKE) test-simulation test-cpp test-fuzz test-vendor-headers test-wheel
	$(MAKE) test-fleets
	$(MAKE) MEASURED=--measured test-rdma test-carriers test-card test-engines
	$(MAKE) coverage

# Lines of Python and C++ that make test ran, or that parts of it ran with MEASURED=--measured. ARGS="--least 20 --json"
coverage:
	@$(PYTHON) scripts/environment.py python -m scripts.coverage_table $(ARGS)

# Two at a time, but for tests that measure CPU time, or what else a user of this machine holds.
ALONE = tests/backends/test_resources.py tests/backends/test_peer_process.py tests/backends/shm tests/test_bench_control.py tests/test_bench_device.py tests/test_bench_peers.py tests/test_bench_rate.py tests/test_bench_routed.py tests/test_bench_telemetry.py tests/test_bench_unfetched.py
test-unit:
ifdef ARGS
	$(RUN) python -m pytest -q $(if $(findstring tests,$(ARGS)),,tests) $(ARGS)
else
	$(RUN) python -m pytest -q -n 2 --dist worksteal --durations 15 tests $(ALONE:%=--ignore %)
	$(RUN) python -m pytest -q --durations 15 $(ALONE)
endif

# What fits into some minutes; other seeds by make simulate.
test-simulation:
	$(RUN) python -m scripts.simulate --schedules 12000 --seed 30000000

# The wheel in a fresh environment without a compiler.
test-wheel:
	$(RUN) sh scripts/test_wheel.sh $(BUILD)

# The rdma backend over soft-RoCE and siw, in guests; needs the packages that it names. ARGS="--full --json"
test-rdma:
	$(RUN) python -m integration_tests.rdma.suite $(ARGS)

# The backends over NIXL and Mooncake, alone and in vLLM's servers; installs them, and says what of the system they need.
test-carriers:
	$(RUN) --peers python -m pytest -q --durations 10 tests/backends/test_placement.py tests/backends/test_ends.py tests/backends/test_peer_process.py tests/backends/carried integration_tests/test_carriers.py -k "nixl or mooncake" $(ARGS)

# What deploy/ holds: manifests by the schemas of Kubernetes' API; with ARGS=--full Ray Serve's app, while replicas die.
test-fleets:
	$(RUN) --fleet python -m pytest -q $(FLEET_TESTS:%=integration_tests/test_%.py) $(ARGS)

# The C++ tests under AddressSanitizer with UBSan, then under ThreadSanitizer.
test-cpp:
	$(RUN) sh scripts/test_cpp.sh $(BUILD)

# The card in a browser (Debian/Ubuntu: apt-get install chromium); skipped with a reason where there is none.
test-card:
	$(RUN) --card sh scripts/test_card.sh $(CARD_TESTS:%=integration_tests/test_%.py) $(ARGS)

# What is assumed of vendors' C interfaces against their headers; fetches Ascend's once.
test-vendor-headers:
	$(RUN) python scripts/check_vendor_signatures.py --require all $(ARGS)

# Real engines, started once for all cases.
test-engines: test-vllm test-sglang

# With the cases that another one of their kind stands for in make test.
test-full:
	$(MAKE) test-unit test-simulation test-cpp test-fuzz test-vendor-headers test-wheel
	$(MAKE) test-rdma test-fleets test-engines ARGS=--full

# Tests that want SGLang skip themselves here.
test-vllm:
	$(RUN) python -m pytest -q --durations 25 integration_tests $(CARD_TESTS:%=--ignore integration_tests/test_%.py) $(FLEET_TESTS:%=--ignore integration_tests/test_%.py) $(ARGS)

# SGLang's pins conflict with vLLM's: it has an environment of its own. vLLM's servers come from theirs.
test-sglang:
	$(RUN) --sglang python -m pytest -q --durations 25 $(SGLANG_TESTS:%=integration_tests/test_%.py) $(ARGS)

# Every kind of request against one server, on pairs of real ones (docs/requests.md). ARGS="--setup lora --json"
matrix:
	$(RUN) python -m scripts.request_matrix $(ARGS)

# The same engine with our connector and with its peers', between network namespaces; needs root, iproute2 and iperf3.
# ARGS="--suite full --state FILE --out docs/results/ab-full.json"
ab:
	$(RUN) --peers python -m scripts.ab $(ARGS)

# The figures of docs/performance.md into docs/results; link needs root. ARGS="transfer store"
performance:
	$(RUN) --peers python -m scripts.performance $(ARGS)

# docs/report.md and the tables of docs/performance.md from the JSON in docs/results.
report:
	$(RUN) --report sage-kvt bench report $(ARGS)

# The real engine over a virtual clock and a lying network, by seed (docs/reliability.md).
# ARGS="--schedules 1000000", "--seed 4711 --schedules 1", "--planted", "--json"
simulate:
	$(RUN) python -m scripts.simulate $(ARGS)

# What clients get when something breaks, on pairs of real servers. ARGS="--engine vllm --only lease --json"
faults:
	$(RUN) python -m scripts.fault_table $(ARGS)

# Every metric against a load that is counted beside it, on pairs of real servers (docs/ops.md).
# ARGS="--engine vllm --only pair --json"
check-telemetry:
	$(RUN) python -m scripts.check_telemetry $(ARGS)

# Every parser of a peer's bytes under libFuzzer; needs clang. ARGS="--frames 10000000 --json"
fuzz:
	@$(PYTHON) scripts/environment.py --fuzz python -m scripts.fuzz $(ARGS)

# The same for about a minute.
test-fuzz:
	@$(PYTHON) scripts/environment.py --fuzz python -m scripts.fuzz --frames 500000

# Changes of the engine, one at a time: what notices them? ARGS="--mutants 200 --json"
mutate:
	$(RUN) --mutation python -m scripts.mutate $(ARGS)

# What wire formats cost in accuracy, on real small models over running pairs (docs/accuracy.md).
# ARGS="--quick", "--models smollm2 --json --state FILE"
accuracy:
	@$(PYTHON) scripts/environment.py --accuracy python -m scripts.accuracy $(ARGS)

lint:
	$(RUN) sh scripts/lint.sh

# Two links between two hosts (namespaces, root), one of which goes down again and again. ARGS="--rounds 1000"
two-links:
	$(RUN) python -m scripts.two_links $(ARGS)

# Many requests while links break and servers die (docs/reliability.md). ARGS="--requests 10000 --json"
soak:
	$(RUN) python -m scripts.soak $(ARGS)

# make bench ARGS="transfer --backend shm --block-bytes 4096 --total-bytes 268435456 --against nixl,limit --json"
bench:
	@$(PYTHON) scripts/environment.py --peers sage-kvt bench $(ARGS)

# What wants a real NVIDIA card, where there is one and no network: make device-check. First, where there is a network:
# make device-check ARGS=--prepare. A rehearsal on an emulated card: make device-check ARGS="--emulated --json"
device-check:
	$(if $(findstring --,$(ARGS)),$(RUN) python,@$(PYTHON)) scripts/device_check.py $(ARGS)

# make shell ARGS="any command"
shell:
	$(RUN) $(or $(ARGS),$${SHELL:-sh})

build:
	$(RUN) python -m scripts.build_card

# A wheel in dist/ that installs without a compiler.
wheel: build
	$(RUN) sh scripts/build_wheel.sh dist

clean:
	rm -rf .venv .venv-sglang .venv-measured .venv-sglang-measured .venv.lock $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
