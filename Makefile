# make demo   a sweep of nine policies on two real traces, its figures and a table
# make test   every test
# make build  build/kvreplay alone;   make bench   timings;   make format   clang-format;   make clean
# Each target installs what it lacks: Debian packages when root or with sudo, Python packages into .venv.
.PHONY: demo test build bench format clean check-format cuda sanitize system
.DELETE_ON_ERROR:

packages = cmake ninja-build g++ git python3 python3-venv libeigen3-dev libtbb-dev libhdf5-dev libyaml-cpp-dev libgtest-dev \
           libcli11-dev libfmt-dev nlohmann-json3-dev libbenchmark-dev
python = .venv/bin/python
cmake_flags ?=

demo: build $(python)
	build/kvreplay run configs/quickstart.yaml --out out/demo
	$(python) -m kvreplay.figures out/demo

test: build/.tests $(python)
	cd build && ctest --output-on-failure -j2
	$(python) -m pytest -q

build: build/build.ninja
	ninja -C build kvreplay

build/.tests: build/build.ninja FORCE
	ninja -C build

build/build.ninja: CMakeLists.txt | system
	cmake -S . -B build -G Ninja $(cmake_flags)

# Debian's tools and libraries; silent and quick when all are there.
system:
	@missing=; for p in $(packages); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	elif command -v sudo >/dev/null; then sudo apt-get update -q && sudo DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else echo "missing Debian packages; as root run: apt-get install$$missing" >&2; exit 1; fi

$(python): pyproject.toml | system
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

bench: build/.tests
	build/bench

format: | clang-format
	clang-format-14 -i $(sources)

check-format: | clang-format
	clang-format-14 --dry-run --Werror $(sources)

clang-format:
	@command -v clang-format-14 >/dev/null || $(MAKE) --no-print-directory system packages=clang-format-14

sources = $(shell git ls-files '*.cpp' '*.hpp' '*.cuh' '*.cu')

# Every policy as device code; needs nvcc, no GPU.
cuda: | system
	cmake -S . -B build-cuda -G Ninja -DKV_CUDA=ON -DKV_CUDA_ARCHITECTURES=90 -DKV_TESTS=OFF -DKV_WERROR=ON $(cmake_flags)
	ninja -C build-cuda kernels

# The readers of files that others write, under the address and undefined-behaviour sanitizers.
sanitize: | system
	cmake -S . -B build-sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKV_SANITIZE=address,undefined -DKV_NATIVE=OFF $(cmake_flags)
	ninja -C build-sanitize fuzz_tests
	build-sanitize/fuzz_tests --gtest_brief=1

clean:
	rm -rf build build-cuda build-sanitize out

FORCE:
