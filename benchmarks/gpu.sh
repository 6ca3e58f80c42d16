#!/usr/bin/env bash
# Builds, tests and measures fastflow on a machine with an NVIDIA GPU, and collects the results.
#
#   benchmarks/gpu.sh OUT_DIR
#
# OUT_DIR gets build.log, tests.log, bench.log, the figures as JSON, report.md with its plots, and
# summary.txt. The exit code is 0 if everything passed.
#
# It downloads nothing: torch with CUDA, nvcc and the packages of the extras "test" and "bench" are
# to be installed already; libraries to compare with that are not are left out. Without a GPU it
# runs the smallest grid on the CPU. What fails or runs out of time does not stop what comes next.
#
# FASTFLOW_LIMIT   seconds for everything (default 570)
# FASTFLOW_BENCH   grid: smoke, short, full (default: short on a GPU, smoke without)
# FASTFLOW_PHASES  which of "build tests bench" to run (default: all)
# FASTFLOW_OPS     which benchmarks, in this order (default: all)

set -u

if [ $# -ne 1 ]; then
  echo "usage: $0 OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

limit=${FASTFLOW_LIMIT:-570}
wanted=${FASTFLOW_PHASES:-build tests bench}
read -ra ops <<<"${FASTFLOW_OPS:-planar_flow autoregressive vae convert pcp}"
report_seconds=30
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg
# pytest without the working directory on the path: what is tested is what was installed
pytest=(python3 -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())')
phases=()
failures=0

# left RESERVE: the seconds until the limit, less a reserve for later phases; at least 5
left() {
  local rest=$((limit - SECONDS - $1))
  echo $((rest > 5 ? rest : 5))
}

# wants PHASE
wants() {
  [[ " $wanted " == *" $1 "* ]]
}

# phase NAME SECONDS LOG COMMAND...: an interrupt at the time limit, so that pytest still writes its
# results, and a kill if that does not help
phase() {
  local name=$1 seconds=$2 log=$3 begin=$SECONDS status
  shift 3
  echo "== $name (at most $seconds s)" | tee -a "$out/$log"
  timeout --signal=INT --kill-after=15 "$seconds" "$@" >>"$out/$log" 2>&1
  status=$?
  phases+=("$(printf '%-20s exit %3d  %4d s' "$name" "$status" $((SECONDS - begin)))")
  [ "$status" -ne 124 ] || phases+=("             out of time")
  [ "$status" -eq 0 ] || failures=$((failures + 1))
  return "$status"
}

rm -f "$out"/{build,tests,bench}.log "$out"/summary.txt

read -r device capability <<<"$(python3 -c '
import torch
if torch.cuda.is_available():
    print("cuda", "%d.%d" % torch.cuda.get_device_capability())
else:
    print("cpu")
')"
if [ "$device" = cuda ]; then
  export FASTFLOW_BUILD=cuda TORCH_CUDA_ARCH_LIST=$capability
  export FASTFLOW_BENCH=${FASTFLOW_BENCH:-short}
else
  device=cpu
  export FASTFLOW_BENCH=${FASTFLOW_BENCH:-smoke}
fi

phase environment 30 build.log bash -c '
  uname -srm
  nproc
  command -v nvidia-smi >/dev/null && nvidia-smi
  command -v nvcc >/dev/null && nvcc --version | tail -2
  c++ --version | head -1
  python3 --version
  python3 -m pip list 2>/dev/null | grep -iE "^(torch|triton|numpy|zuko|nflows|normflows|pyro-ppl|pytest)"
  true'

if wants build; then
  site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  install=(python3 -m pip install --no-build-isolation --no-deps --no-index -v)
  if [ -w "$site" ]; then
    phase build "$(left 300)" build.log "${install[@]}" -e .
  else
    own_site=$(mktemp -d)
    phase build "$(left 300)" build.log "${install[@]}" --target "$own_site" .
    export PYTHONPATH="$own_site${PYTHONPATH:+:$PYTHONPATH}"
  fi
fi
phase info 60 build.log python3 -m fastflow

if wants tests; then
  workers=()
  if [ "$(nproc)" -ge 8 ] && python3 -c 'import xdist' 2>/dev/null; then
    workers=(-n 4)
  fi
  wants bench && reserve=300 || reserve=5
  phase tests "$(left "$reserve")" tests.log \
    "${pytest[@]}" tests/ -q -ra -p no:cacheprovider "${workers[@]}"
fi

if wants bench; then
  numbers=()
  for i in "${!ops[@]}"; do # in equal shares of what is left, so that none uses up another's time
    op=${ops[i]}
    seconds=$(($(left "$report_seconds") / (${#ops[@]} - i)))
    phase "bench $op" "$seconds" bench.log \
      "${pytest[@]}" "benchmarks/bench_$op.py" --benchmark-only -ra -p no:cacheprovider \
      --bench-device "$device" --bench-seconds $((seconds * 3 / 4)) \
      --benchmark-columns=median,iqr,rounds --benchmark-json "$out/$device-$op.json"
    [ -s "$out/$device-$op.json" ] && numbers+=("$out/$device-$op.json")
  done
  phase report "$report_seconds" bench.log \
    python3 benchmarks/report.py "${numbers[@]}" --out "$out"
fi

# last_line LOG: how pytest closed
last_line() {
  [ -f "$out/$1" ] && grep -E '[0-9]+ (passed|failed|error)' "$out/$1" | tail -1
}

{
  printf '%s\n' "${phases[@]}"
  echo "tests: $(last_line tests.log)"
  grep -E '[0-9]+ (passed|failed|error)' "$out/bench.log" 2>/dev/null | sed 's/^/bench: /'
  cat "$out"/{tests,bench}.log 2>/dev/null | grep -E '^(FAILED|ERROR|SKIPPED)' | head -40
  [ -f "$out/report.md" ] && sed '/^#### All/,$d' "$out/report.md"
} | cut -c1-200 | tee "$out/summary.txt"
ls -l "$out"
exit $((failures > 0))
