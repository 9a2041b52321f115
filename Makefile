# make test         the extension built in the tree, and the whole test suite
# make demo         guard on a silently wrong gradient; training with these ops; the modules of the tutorials
# make bench        the benchmarks, side by side with torch: the short set
# make bench-full   every size, layout, dtype and mode: hours
# make lint         ruff, mypy and clang-format
# make docs         the pages and the API as a site in build/docs, with every link checked
# make sanitize     the core under AddressSanitizer and UndefinedBehaviorSanitizer
# make coverage     which lines of Python and C++ the tests reach: docs/coverage.md, and each line in build/
# make test-matrix  the whole suite on each torch that pyproject.toml lists, and docs/matrix.md of what came of it: hours
# make wheels       for each of these a wheel without CUDA and one with, in dist/, and each tested in a fresh environment
# make clean        what was built is removed; the environments in .venv/ stay
#
# Each target sets up what it needs, in a virtual environment of its own per torch:
#   TORCH=torch==2.14.1 make test     another torch (any requirement pip understands)
#   TORCH=installed make test         no virtual environment and no download: what $(PYTHON) has
#   VENV=somewhere, PYTHON=python3.12, FORCE_CUDA=0|1, TORCH_CUDA_ARCH_LIST="9.0"
#   MAX_JOBS=4                        compilers, and processes of pytest, at a time; as many as there are cores by default
#   SANITIZER=address,undefined       what make sanitize builds with
#   TESTS="tests/test_values.py"      what make sanitize and make coverage run
#   TORCHES="2.11.0 2.15.0"           those that make test-matrix and make wheels go through; REUSE=1 keeps what was compiled
#   ARGS="-k mul_ -x"                 more arguments for pytest, the demo or the benchmarks

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0
KEY := $(shell tr -c 'A-Za-z0-9.+\n' - <<< '$(subst ==,-,$(TORCH))')
VENV ?= .venv/$(KEY)
MAX_JOBS ?= $(shell nproc)
ARGS ?=
export MAX_JOBS

# As pyproject.toml says: >=3.a,<3.b.
PYTHONS := $(shell sed -nE 's/^requires-python = "(.*)"$$/\1/p' pyproject.toml)
SUPPORTED := import re, sys; first, beyond = map(int, re.findall(r"3\.(\d+)", "$(PYTHONS)")); \
	sys.exit(not (3, first) <= sys.version_info[:2] < (3, beyond))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(SUPPORTED)' 2>/dev/null && echo "$$p" && break; done)

# The tests, the demo and the benchmarks use the extension built in the source tree.
export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
say = @echo "==> $(1)"

ifeq ($(TORCH),installed)
PY := $(PYTHON)
extra =
venv :=
else
PY := $(VENV)/bin/python
extra = $(VENV)/.extra-$(1)
venv := $(VENV)/.torch
endif

BUILD := build/$(KEY)
BUILT := $(BUILD)/built
# One torch at a time has its extension in the tree; its objects stay in $(BUILD), so that coming back is cheap.
CONFIG := $(KEY) $(VENV) $(FORCE_CUDA) $(TORCH_CUDA_ARCH_LIST)
IN_TREE := build/in-tree
NOTE := safe_inplace/_build_info.py
CPP_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py $(shell find csrc -type f) $(wildcard tests/simulator/*.cpp tests/simulator/*.h tests/toy_backend/*.cpp tests/toy_backend/*.h)

# What the tests need, and what they need besides with this torch, where pyproject.toml has an extra named after it.
TEST_EXTRAS := test demo $(shell sed -nE 's/^"(test-$(KEY))" = .*/\1/p' pyproject.toml)

.PHONY: help test demo bench bench-full lint docs sanitize coverage test-matrix wheels clean again
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

test: $(BUILT) $(foreach name,$(TEST_EXTRAS),$(call extra,$(name)))
	$(call say,tests of safe_inplace on $(TORCH))
	@$(PY) -m safe_inplace env
	@$(PY) -m pytest -n $(MAX_JOBS) --dist worksteal $(ARGS)

demo: $(BUILT) $(call extra,demo)
	$(call say,the demo 1 of 4: a wrong gradient without any error - and what the guard says of it)
	@cat examples/silently_wrong.py
	$(PY) examples/silently_wrong.py
	$(PY) -m safe_inplace run --exit-zero examples/silently_wrong.py
	$(call say,the demo 2 of 4: training on digits with torch's ops and with these)
	@KINETO_LOG_LEVEL=99 $(PY) -m examples.digits $(ARGS)
	$(call say,the demo 3 of 4: the modules of the in-place tutorials)
	@$(PY) -m examples.tutorial_modules
	$(call say,the demo 4 of 4: what the guard says of a careless write)
	@$(PY) -m examples.guard_report

bench: $(BUILT) $(call extra,bench)
	$(call say,the benchmarks - the short set)
	@$(PY) -m benchmarks $(ARGS)

bench-full: $(BUILT) $(call extra,bench)
	$(call say,the benchmarks - the full set)
	@$(PY) -m benchmarks --full $(ARGS)

lint: $(BUILT) $(call extra,lint)
	$(call say,ruff and mypy and clang-format)
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror $(CPP_FILES)

SITE := build/docs
docs: $(BUILT) $(call extra,docs)
	$(call say,the site of docs/ in $(SITE); a broken link or an unknown name is an error)
	@rm -rf $(SITE)
	@$(PY) -m sphinx -W --keep-going -q -d build/doctrees -E -c docs . $(SITE)
	@cp $(SITE)/README.html $(SITE)/index.html
	@$(PY) docs/check_site.py $(SITE)

# Built in a copy of the tree, so that the extension of the other targets stays. What is left out starts compilers, other
# interpreters or builds of its own, reads the docs, or asks the system for memory in a way that the sanitizer answers otherwise:
# what is freed stays resident for a while.
SANITIZER ?= address,undefined
SANITIZED := build/sanitize-$(KEY)/$(SANITIZER)
sanitize: TESTS ?= $(filter-out $(addprefix tests/test_,benchmarks.py compile.py docs.py examples.py large_pages.py matrix.py package.py pages.py), \
	$(wildcard tests/test_*.py)) $(addprefix tests/programs/,test_forward.py test_backward.py) \
	$(addprefix tests/guard/,test_guard.py test_bugs.py test_torch_features.py)
# Each access checked by a call: the files full of vectors compile in little more than half the time. Left out is what took a fifth
# of the rest: AddressSanitizer stops at a null pointer and beyond an object as well, and x86 takes every alignment.
SANITIZE := -fsanitize=$(SANITIZER) -fno-sanitize=vptr,null,object-size,alignment -fno-sanitize-recover=undefined -fno-omit-frame-pointer \
	--param asan-instrumentation-with-call-threshold=0

# The extensions of the tests take long to compile: only for tests that import them.
TEST_FILES = $(foreach test,$(TESTS),$(firstword $(subst ::, ,$(test))))
TEST_EXTENSIONS = $(if $(shell grep -rlsE 'simulator|toy_backend' $(or $(TEST_FILES),tests)),build_test_extensions)

# The second: the first asks for it before anything that throws has been loaded.
SANITIZER_LIBRARIES = $(foreach name,$(if $(findstring thread,$(SANITIZER)),tsan,asan) stdc++,$$($(CXX) -print-file-name=lib$(name).so))

sanitize: $(venv) $(foreach name,$(TEST_EXTRAS),$(call extra,$(name)))
	$(call say,building the extension with $(SANITIZER) for $(TORCH); all that the compilers say is in $(SANITIZED)/log)
	@mkdir -p $(SANITIZED)/tree
	@tar cf - --exclude='*.so' --exclude=_build_info.py setup.py pyproject.toml README.md csrc safe_inplace tests examples benchmarks \
		| tar xf - -C $(SANITIZED)/tree
	@cd $(SANITIZED)/tree && SAFE_INPLACE_CXXFLAGS='-O1 -g1 $(SANITIZE)' LDFLAGS='$(SANITIZE)' FORCE_CUDA=0 \
		$(abspath $(PY)) setup.py build_ext --inplace $(TEST_EXTENSIONS) > ../log 2>&1 || { tail -n 40 ../log; exit 1; }
	$(call say,tests with $(SANITIZER))
	@cd $(SANITIZED)/tree && PYTHONPATH=$$PWD LD_PRELOAD="$(SANITIZER_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 \
		$(abspath $(PY)) -m pytest -n $(MAX_JOBS) --dist worksteal -p no:cacheprovider -k 'not no_leak' $(TESTS) $(ARGS)

# Built in a copy of the tree, too. Threads count with atomics. What a process counts it writes as it ends: by itself, or by
# tests/counts.py, which calls what only these two options put into the library.
COVERAGE := build/coverage-$(KEY)
COVERED := $(COVERAGE)/tree
coverage: TESTS ?= tests
coverage: export COMMAND = make coverage$(if $(filter-out tests,$(TESTS)), TESTS="$(TESTS)")$(if $(ARGS), ARGS="$(ARGS)")
coverage: $(venv) $(foreach name,$(TEST_EXTRAS) coverage,$(call extra,$(name)))
	$(call say,building the extension with --coverage for $(TORCH); all that the compilers say is in $(COVERAGE)/log)
	@mkdir -p $(COVERED) && find $(COVERED) -mindepth 1 -maxdepth 1 ! -name build -exec rm -r {} +
	@tar cf - --exclude-vcs --exclude='./.venv*' --exclude=./build --exclude=./dist --exclude='*.so' --exclude=_build_info.py \
		--exclude=__pycache__ . | tar xf - -C $(COVERED)
	@cd $(COVERED) && SAFE_INPLACE_CXXFLAGS='-O1 --coverage -fprofile-update=prefer-atomic' FORCE_CUDA=0 \
		LDFLAGS='--coverage -Wl,-u,__gcov_dump -Wl,-u,__gcov_reset' \
		$(abspath $(PY)) setup.py build_ext --inplace $(TEST_EXTENSIONS) > ../log 2>&1 || { tail -n 40 ../log; exit 1; }
	@find $(COVERED) -name '*.gcda' -delete && rm -rf $(COVERAGE)/{python,core} $(COVERAGE)/python.data* $(COVERAGE)/*.{json,xml}
	$(call say,tests with coverage)
	@export COMMIT=$$($(abspath $(PY)) -c 'from benchmarks.pages import commit; print(commit())') \
		COVERAGE_FILE=$(abspath $(COVERAGE))/python.data PYTHONPATH=$(abspath $(COVERED)); cd $(COVERED); \
		$(abspath $(PY)) -m coverage run -m pytest -p tests.counts -n $(MAX_JOBS) --dist worksteal -p no:cacheprovider \
			--junitxml=../tests.xml $(TESTS) $(ARGS) || failed=$$?; \
		$(abspath $(PY)) -m coverage combine -q; $(abspath $(PY)) -m coverage json -q -o ../python.json; \
		$(abspath $(PY)) -m coverage html -q -d ../python; mkdir -p ../core; \
		$(abspath $(PY)) -m gcovr --root . --filter csrc/ --merge-lines --merge-mode-functions=separate --exclude-throw-branches \
			--exclude-unreachable-branches --json-summary ../core.json --html-nested ../core/index.html build; \
		STATUS=$${failed:-0} $(abspath $(PY)) docs/coverage_page.py .. $(CURDIR); exit $${failed:-0}
	$(call say,each line: $(COVERAGE)/python/index.html and $(COVERAGE)/core/index.html)

clean:
	$(call say,removing build/ and dist/ and the extension in the tree; .venv/ stays)
	@rm -rf build dist *.egg-info safe_inplace/_C*.so tests/*/_*.so $(NOTE)

define require-python
@test -n '$(PYTHON)' || { echo 'Python $(PYTHONS) is needed, and none is on PATH; install one, or name it: PYTHON=...'; exit 1; }
@'$(PYTHON)' -c '$(SUPPORTED)' || { echo '$(PYTHON) is not Python $(PYTHONS); name one: PYTHON=...'; exit 1; }
endef

# By the targets above, with each torch in turn. TORCHES, ARGS and REUSE are read from the environment, where make leaves what
# it was given.
test-matrix wheels:
	$(require-python)
	@'$(PYTHON)' -m matrix $@

$(VENV)/.python:
	$(require-python)
	$(call say,virtual environment $(VENV) with $(shell $(PYTHON) --version))
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# What the build needs is read from pyproject.toml, as are the extras below: named once.
requirements = $(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print("\n".join($(1)))'

$(VENV)/.torch: $(VENV)/.python
	$(call say,installing $(TORCH) and the tools of the build)
	@$(PY) -m pip install -qq '$(TORCH)' numpy -r <($(call requirements,p["build-system"]["requires"]))
	@touch $@

# With the torch that is there, whatever one of them, or a setting of pip, would have in its place.
THIS_TORCH = <($(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))')

$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml
	$(call say,installing what the $* needs)
	@$(PY) -m pip install -qq -c $(THIS_TORCH) -r <($(call requirements,p["project"]["optional-dependencies"]["$*"]))
	@touch $@

ifneq ($(CONFIG),$(shell cat $(IN_TREE) 2>/dev/null))
$(BUILT): again
endif
# Written by every build: where it is newer than ours, another torch may have been built for by hand.
$(NOTE):

$(BUILT): $(SOURCES) $(NOTE) $(venv)
	$(call say,building the extension for $(TORCH); all that the compilers say is in $(BUILD)/log)
	@mkdir -p $(BUILD) && rm -f $(IN_TREE)
	@$(PY) setup.py build_ext --inplace --build-temp $(BUILD)/temp --build-lib $(BUILD)/lib \
			build_test_extensions --build-temp $(BUILD)/temp 2>&1 | tee $(BUILD)/log \
		| sed -u -nE 's|^(\[[0-9]+/[0-9]+\]).* -c -c ([^ ]*/)?((csrc\|tests)/[^ ]+) .*|    \1 \3|p; /(warning|error)[ :]/p' \
		|| { tail -n 40 $(BUILD)/log; exit 1; }
	@echo '$(CONFIG)' > $(IN_TREE)
	@touch $@
