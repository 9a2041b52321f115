#!/usr/bin/env bash
# benchmarks/gpu_host.sh FOLDER
#
# Everything that only a GPU shows, offline, with the python3 that has torch: builds, runs the whole suite, the kernels
# under compute-sanitizer, and the benchmarks, or with BASE the short set of two builds in turns. Leaves at most 8 files in
# FOLDER, summary.txt first. Stages are bounded, 25 minutes in all, and a failed one does not stop the others; the exit
# status is the number that failed. Without a GPU the same stages run on the CPU, but for the sanitizer.
#
#   COMMIT=0123abc           what the results call the tree; needed where it has no history of its own
#   BASE=some.whl            another build, or a tree to build it from: every row's time over that with it, in compare.csv
#   BASE_COMMIT=4567def      what the results call the base, where it has no history either
#   STAGES="build tests"     a choice of: build tests memcheck racecheck benchmarks compare, and models, which is only done if
#                            asked for: steps of what is installed of timm, transformers and diffusers, in models.csv
#   LIMIT=570                seconds for all stages together: none runs past them
#   WHEEL=some.whl           the wheel that an earlier build left in its folder, instead of compiling
#   BENCH_ARGS="--ops mul_"  arguments for python -m benchmarks run, compare or models
#   TEST_ARGS="-k mul_"      arguments for pytest
#   PYTHON=python3.12
set -uo pipefail
if [ $# -ne 1 ]; then
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheel=${WHEEL:+$(realpath "$WHEEL")}
base=${BASE:+$(realpath "$BASE")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# commit_of TREE: by its own history. A repository around it has that of something else.
commit_of() {
  [ "$(git -C "$1" rev-parse --show-toplevel 2> /dev/null)" = "$(cd "$1" && pwd -P)" ] && git -C "$1" describe --always --dirty
}

commit=$(commit_of . || echo "${COMMIT-}")
if [ -z "$commit" ]; then
  echo "this tree has no history of its own: COMMIT=... names what is measured"
  exit 2
fi

python=${PYTHON:-python3}
stages=${STAGES:-build tests memcheck racecheck $([ -n "$base" ] && echo compare || echo benchmarks)}
limit=${LIMIT:-1500}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 1
if [ "$device" = cuda ]; then
  default_archs=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$default_archs} FORCE_CUDA=1
fi
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer
failed=0

# lacking MODULE...: those that this Python does not have.
lacking() {
  "$python" -c 'import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))' "$@"
}

{
  date -u +%FT%TZ
  "$python" --version
  "$python" -c 'import torch; print("torch", torch.__version__)'
  echo "commit $commit"
  [ -z "$base" ] || echo "base $base"
  [ "$device" = cuda ] && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} | tee "$out/summary.txt"

note() { printf '%-10s %s\n' "$1" "$2" | tee -a "$out/summary.txt"; }

# stage NAME SECONDS MODULES COMMAND...: skipped, and counted as failed, where a module it cannot do without is lacking.
stage() {
  local name=$1 bound=$2 modules=$3 start=$SECONDS rc missing
  shift 3
  case " $stages " in *" $name "*) ;; *) return 0 ;; esac
  # Words of a list.
  # shellcheck disable=SC2086
  missing=$(lacking $modules)
  if [ -n "$missing" ]; then
    note "$name" "not run: $python lacks $missing"
    failed=$((failed + 1))
    return
  fi
  bound=$((limit - SECONDS < bound ? limit - SECONDS : bound))
  if [ "$bound" -lt 10 ]; then
    note "$name" "not run: the $limit s are used up"
    failed=$((failed + 1))
    return
  fi
  # Nothing may wait for a terminal: timeout has put it in the background.
  SECONDS_LEFT=$bound timeout --kill-after=10 "$bound" "$@" > "$scratch/log" 2>&1 < /dev/null
  rc=$?
  # A log that a broken kernel floods is cut in the middle.
  { head -c 4M "$scratch/log"; tail -c +4194305 "$scratch/log" | tail -c 4M; } > "$out/$name.log"
  note "$name" "$(printf 'rc %3d  %4d s  %s' "$rc" $((SECONDS - start)) "$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-100)")"
  if [ "$rc" -ne 0 ]; then
    failed=$((failed + 1))
  fi
}

# make_wheel TREE FOLDER
make_wheel() {
  "$python" -m pip wheel --no-build-isolation --no-deps --no-index --wheel-dir "$2" "$1"
}

# The wheel is what users get; its extension is put into the tree, beside the tests and benchmarks.
build() {
  if [ -z "$wheel" ]; then
    make_wheel . "$scratch" || return
    wheel=$(ls "$scratch"/*.whl)
    cp "$wheel" "$out"
  fi
  "$python" -m pip install --no-deps --no-index --target "$scratch/site" "$wheel" &&
    cp "$scratch"/site/safe_inplace/_C*.so "$scratch"/site/safe_inplace/_build_info.py safe_inplace/ &&
    "$python" -m safe_inplace env &&
    "$python" setup.py build_test_extensions
}

tests() {
  local options=(-q --tb=short -p no:cacheprovider --continue-on-collection-errors)
  [ -z "$(lacking xdist)" ] && options+=(-n "$((MAX_JOBS < 16 ? MAX_JOBS : 16))" --dist worksteal)
  [ -z "$(lacking pytest_timeout)" ] && options+=(--timeout 180)
  # Words in TEST_ARGS are separate arguments.
  # shellcheck disable=SC2086
  "$python" -m pytest "${options[@]}" ${TEST_ARGS-}
}

# Every kernel that 32-bit indices reach, once or more, on memory whose ends the sanitizer knows exactly.
cat > "$scratch/driver.py" <<'PYTHON'
import itertools
import os
import random
import time

import torch

from tests.checks import assert_close, grad_tolerance
from tests.layouts import KERNEL_DTYPES, random_tensor
from tests.op_table import OPS

began, seconds = time.monotonic(), float(os.environ["SECONDS_LEFT"]) * 0.8
device = "cuda" if torch.cuda.is_available() else "cpu"
shapes = [
    ((64, 96), (96,)),
    ((64, 49), (49,)),
    ((64, 49), (64, 1)),
    ((3, 8, 14, 14), (8, 1, 1)),
    ((3, 300, 64), (3, 1, 64)),
    ((2000, 32), (32,)),
    ((4001,), (4001,)),
    ((9001,), (1,)),
]
torch.manual_seed(0)
cases = [
    (op, dtype, operand_dtype, *shape, offset)
    for op, dtype, shape, offset in itertools.product(OPS, KERNEL_DTYPES, shapes, (0, 1))
    for operand_dtype in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}
]
# What the time cuts off is a sample of everything.
random.Random(0).shuffle(cases)
done = 0
for op, dtype, operand_dtype, shape, small, offset in cases:
    if time.monotonic() - began > seconds:
        break
    x = random_tensor((*shape[:-1], shape[-1] + offset), dtype, device)[..., offset:]
    operands = [random_tensor(small, operand_dtype, device) for _ in op.operands]
    leaves = [t.detach().requires_grad_() for t in (x, *operands)]
    grad = random_tensor(shape, dtype, device)
    actual = torch.autograd.grad(op.function(leaves[0].clone(), *leaves[1:]), leaves, grad)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = [t.detach().to(wide).requires_grad_() for t in leaves]
    result = op.reference(*exact)
    for a, e in zip(actual, torch.autograd.grad(result, exact, grad.to(wide))):
        terms = x.numel() // a.numel()
        assert_close(a, e, grad_tolerance(dtype, terms) * terms**0.5)
    # Once more where it lies, between the elements that are not its own.
    op.function(x, *operands)
    assert_close(x, result, grad_tolerance(dtype))
    done += 1
print(f"{done} of {len(cases)} cases", flush=True)
PYTHON

sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-regex kns=safe_inplace --report-api-errors no \
    --print-limit 50 --error-exitcode 9 "$python" "$scratch/driver.py"
}

benchmarks() {
  # Words in BENCH_ARGS are separate arguments.
  # shellcheck disable=SC2086
  "$python" -m benchmarks run --device "$device" --within $((SECONDS_LEFT - 40)) ${BENCH_ARGS-}
  local rc=$?
  tar -czf "$out/results.tar.gz" benchmarks/results README.md
  return $rc
}

models() {
  # shellcheck disable=SC2086
  "$python" -m benchmarks models --device "$device" --within $((SECONDS_LEFT - 40)) --output "$out/models.csv" ${BENCH_ARGS-}
}

# A tree is built as it is: in a copy, and without what it was built into before.
compare() {
  if [ -d "$base" ]; then
    BASE_COMMIT=$(commit_of "$base" || echo "${BASE_COMMIT:-unknown}")
    export BASE_COMMIT
    mkdir "$scratch/base"
    tar -C "$base" --exclude=./.git --exclude='./.venv*' --exclude=./build --exclude='*.so' -cf - . | tar -C "$scratch/base" -xf - &&
      make_wheel "$scratch/base" "$scratch/base-wheel" || return
    base=$(ls "$scratch"/base-wheel/*.whl)
  fi
  # shellcheck disable=SC2086
  "$python" -m benchmarks compare --base "$base" --device "$device" --output "$out/compare.csv" \
    --within $((SECONDS_LEFT - SECONDS - 40)) ${BENCH_ARGS-}
}

# timeout starts a program, not a shell function.
export -f commit_of build make_wheel tests sanitize benchmarks models compare lacking
export python scratch device out wheel base BENCH_ARGS TEST_ARGS COMMIT

stage build 400 "pip setuptools wheel ninja packaging" bash -c build
stage tests 600 "pytest numpy" bash -c tests
for tool in memcheck racecheck; do
  case " $stages " in *" $tool "*) ;; *) continue ;; esac
  if [ "$device" = cpu ]; then
    note $tool "not run: no CUDA device"
  elif ! command -v compute-sanitizer > /dev/null; then
    note $tool "not run: no compute-sanitizer on PATH"
    failed=$((failed + 1))
  else
    stage $tool 150 "numpy" bash -c "sanitize $tool"
  fi
done
stage benchmarks 400 "numpy rich matplotlib" bash -c benchmarks
stage models 900 "numpy rich matplotlib transformers" bash -c models
if [ -n "$base" ]; then
  stage compare 900 "numpy rich matplotlib" bash -c compare
fi
exit $failed
