#!/usr/bin/env bash
# benchmarks/gpu_host.sh FOLDER
#
# Everything that only a GPU shows, offline, with the python3 that has torch: builds, runs the tests on the device, the
# kernels under compute-sanitizer, and the benchmarks. Leaves at most 8 files in FOLDER, summary.txt first. Stages are
# bounded, 25 minutes in all, and a failed one does not stop the others; the exit status is the number that failed.
# Without a GPU the same stages run on the CPU, but for the sanitizer.
#
#   STAGES="build tests"     a choice of: build tests memcheck racecheck benchmarks
#   BENCH_ARGS="--ops mul_"  arguments for python -m benchmarks
#   PYTHON=python3.12
set -uo pipefail
if [ $# -ne 1 ]; then
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
stages=${STAGES:-build tests memcheck racecheck benchmarks}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 1
if [ "$device" = cuda ]; then
  default_archs=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$default_archs}
fi
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
failed=0

{
  date -u +%FT%TZ
  "$python" --version
  "$python" -c 'import torch; print("torch", torch.__version__)'
  git describe --always --dirty 2> /dev/null
  [ "$device" = cuda ] && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} | tee "$out/summary.txt"

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  case " $stages " in *" $name "*) ;; *) return 0 ;; esac
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
  rc=$?
  printf '%-10s rc %3d  %4d s  %s\n' "$name" "$rc" $((SECONDS - start)) "$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-100)" |
    tee -a "$out/summary.txt"
  if [ "$rc" -ne 0 ]; then
    failed=$((failed + 1))
  fi
}

skipped() { printf '%-10s skipped: %s\n' "$1" "$2" | tee -a "$out/summary.txt"; }

# The wheel is what users get; its extension is put into the tree, beside the tests and benchmarks.
build() {
  "$python" -m pip wheel --no-build-isolation --no-deps --no-index --wheel-dir "$scratch" . &&
    "$python" -m pip install --no-deps --no-index --target "$scratch/site" "$scratch"/*.whl &&
    cp "$scratch"/site/safe_inplace/_C*.so "$scratch"/site/safe_inplace/_build_info.py safe_inplace/ &&
    "$python" -m safe_inplace env
}

tests() {
  local options=(-q --tb=short -p no:cacheprovider)
  "$python" -c 'import xdist' 2> /dev/null && options+=(-n "$((MAX_JOBS < 8 ? MAX_JOBS : 8))" --dist worksteal)
  "$python" -c 'import pytest_timeout' 2> /dev/null && options+=(--timeout 180)
  # On a CPU, the tests that put the same kernels through the simulator.
  if [ "$device" = cuda ]; then
    options+=(-k cuda)
  else
    options+=(tests/test_cuda_plan.py)
  fi
  "$python" -m pytest "${options[@]}"
}

# Every kernel once or more, on memory whose ends the sanitizer knows exactly.
cat > "$scratch/driver.py" <<'PYTHON'
import itertools
import sys

import torch

from tests.checks import assert_close, grad_tolerance
from tests.layouts import random_tensor
from tests.op_table import OPS

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
for op, dtype, (shape, small) in itertools.product(OPS, [torch.bfloat16, torch.float32, torch.complex128], shapes):
    for operand_dtype in {dtype, torch.float32 if dtype == torch.bfloat16 else dtype}:
        for offset in (0, 1):
            x = random_tensor((*shape[:-1], shape[-1] + offset), dtype, "cuda")[..., offset:]
            operands = [random_tensor(small, operand_dtype, "cuda") for _ in op.operands]
            leaves = [t.detach().requires_grad_() for t in (x, *operands)]
            grad = random_tensor(shape, dtype, "cuda")
            result = op.function(leaves[0].clone(), *leaves[1:])
            actual = torch.autograd.grad(result, leaves, grad)
            wide = torch.complex128 if dtype.is_complex else torch.float64
            exact = [t.detach().to(wide).requires_grad_() for t in leaves]
            expected = torch.autograd.grad(op.reference(*exact), exact, grad.to(wide))
            for a, e in zip(actual, expected):
                assert_close(a, e, grad_tolerance(dtype, x.numel() // a.numel()) * (x.numel() // a.numel()) ** 0.5)
    print(op.name, dtype, shape, flush=True)
PYTHON

sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-regex kns=safe_inplace --error-exitcode 9 \
    "$python" "$scratch/driver.py"
}

benchmarks() {
  # Words in BENCH_ARGS are separate arguments.
  # shellcheck disable=SC2086
  "$python" -m benchmarks run --device "$device" ${BENCH_ARGS-}
  local rc=$?
  "$python" -m benchmarks report
  # The result files, and whatever the report renewed from them.
  { ls -d benchmarks/results; git ls-files -m -o --exclude-standard docs README.md; } 2> /dev/null |
    tar -czf "$out/results.tar.gz" --files-from -
  return $rc
}

# timeout starts a program, not a shell function.
export -f build tests sanitize benchmarks
export python scratch device out BENCH_ARGS

stage build 540 bash -c build
stage tests 420 bash -c tests
for tool in memcheck racecheck; do
  case " $stages " in *" $tool "*) ;; *) continue ;; esac
  if [ "$device" = cpu ]; then
    skipped $tool "no CUDA device"
  elif ! command -v compute-sanitizer > /dev/null; then
    skipped $tool "no compute-sanitizer on PATH"
  else
    stage $tool 120 bash -c "sanitize $tool"
  fi
done
stage benchmarks 300 bash -c benchmarks
exit $failed
