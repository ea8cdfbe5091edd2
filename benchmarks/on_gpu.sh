#!/usr/bin/env bash
# bash benchmarks/on_gpu.sh [--build-only] [--only PART]... [--again] [--limit N] [--total N] [--dry]
#
# On a machine with an NVIDIA GPU and nvcc: builds the CUDA engine for it, runs the device tests and
# compute-sanitizer, measures, and prints the table. Parts, in this order:
#
#   build       pip install of this checkout, for this machine's GPU alone
#   tests       tests/engines/test_cuda_device.py, a process for each path of the engine
#   sanitizer   compute-sanitizer's memcheck and racecheck on the small ones of these tests
#   benchmarks  benchmarks/engines/bench_cuda.py, without what takes long to compile
#   compiled    the rest of it: torch.compile of the eager reference; FlashRNN, where it is installed
#   triton      tests of the triton engine, and benchmarks/engines/bench_triton.py
#   network     benchmarks/bench_network.py
#   table       of what was measured
#
# --only PART   this part alone (may be repeated); it runs even if it is done
# --build-only  the same as --only build
# --again       every part, done or not
# --limit N     seconds for each command, instead of its part's own limit
# --total N     seconds for all of them (560): what no time is left for fails, and runs the next time
# --dry         says what would run
#
# Logs and JSON lie in ${OUT:-benchmarks/on_gpu}. A part that succeeded is not repeated while the
# sources that it depends on, and the GPU, are the same: build/on_gpu remembers it, with what it left.
# A part that fails or runs into its limit stops no other; the exit status is then 1. In a copy without
# git's own files, MMIXER_COMMIT names the commit. PYTHON: the interpreter, else python3.
# shellcheck disable=SC2329  # part_... are called by their names
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

parts=(build tests sanitizer benchmarks compiled triton network table)
declare -A limits=([build]=240 [tests]=60 [sanitizer]=40 [benchmarks]=150 [compiled]=240
  [triton]=180 [network]=180)
# A limit is for one command: tests have four, sanitizer and triton two.

python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 # the latter: products of equal bits
out=${OUT:-benchmarks/on_gpu}
memory=build/on_gpu
chosen=()
again=0 dry=0 limit='' total=560 status=0

usage() {
  sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

fail() {
  printf 'on_gpu.sh: %s\n' "$1" >&2
  exit 2
}

choose() {
  local part
  for part in "${parts[@]}"; do
    if [[ $part == "$1" ]]; then
      chosen+=("$1")
      return
    fi
  done
  fail "there is no part '$1', but: ${parts[*]}"
}

while (($#)); do
  case $1 in
    --build-only) choose build ;;
    --only)
      (($# > 1)) || fail '--only needs a part'
      choose "$2"
      shift
      ;;
    --again) again=1 ;;
    --limit | --total)
      [[ ${2-} =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a number of seconds"
      if [[ $1 == --limit ]]; then limit=$2; else total=$2; fi
      shift
      ;;
    --dry) dry=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail "unknown argument '$1'; --help tells more" ;;
  esac
  shift
done

wanted() {
  local part
  ((${#chosen[@]} == 0)) && return 0
  for part in "${chosen[@]}"; do [[ $part == "$1" ]] && return 0; done
  return 1
}

# A number for the contents of some files and folders.
fingerprint() {
  find "$@" -type f \( -name '*.py' -o -name '*.h' -o -name '*.cu' -o -name '*.cpp' -o -name '*.sh' \
    -o -name '*.toml' -o -name CMakeLists.txt \) -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum | sha256sum | cut -c 1-16
}

gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2>/dev/null | sort -u) || gpu=''
architectures=$(sed -n 's/.*, \([0-9]*\)\.\([0-9]*\)$/\1\2/p' <<<"$gpu" | sort -u | paste -s -d ';')
commit=${MMIXER_COMMIT:-$(git rev-parse HEAD 2>/dev/null)} || commit=unknown
built=(csrc python setup.py pyproject.toml CMakeLists.txt)
machine=$(printf '%s' "$gpu" "$("$python" --version 2>&1)" | sha256sum | cut -c 1-8)

# What must be the same for a part that is done to stay done. The commit is a label, where a copy has
# one; that the sources are the same is what counts.
key_of() {
  local files=("${built[@]}")
  [[ $1 == build ]] || files+=(mmixer_kernels tests benchmarks)
  printf '%s-%s-%s' "${commit:0:12}" "$(fingerprint "${files[@]}")" "$machine"
}

# run LOG COMMAND...: under the part's limit. SIGINT lets pytest end in order.
run() {
  local log=$out/$1 code seconds=${limit:-${limits[$part]}}
  shift
  if ((dry)); then
    printf '  would run, %s s at most: %s\n' "$seconds" "$*"
    return 0
  fi
  ((seconds < total - SECONDS)) || seconds=$((total - SECONDS))
  if ((seconds < 1)); then
    printf '  no time left for: %s\n' "$*" | tee -a "$log"
    return 1
  fi
  printf '$ %s\n' "$*" >>"$log"
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >>"$log" 2>&1
  code=$?
  if ((code == 124 || code == 137)); then printf 'stopped after %s s\n' "$seconds" >>"$log"; fi
  ((code == 0)) || printf '  exit status %s: %s\n' "$code" "$*"
  return "$code"
}

# Without the engine every test would be skipped, which is no success.
engine_here() {
  ((dry)) && return 0
  "$python" - <<'END' >>"$out/$1" 2>&1
from mmixer_kernels import engines
state = engines()["cuda"]
print("engine cuda:", state.reason)
raise SystemExit(not state.available)
END
}

part_build() {
  [[ -n $architectures ]] || printf '  nvidia-smi tells no GPU: CMake chooses the architectures\n'
  command -v nvcc >/dev/null || PATH=/usr/local/cuda/bin:$PATH
  run build.log env "MMIXER_CUDA_ARCHS=$architectures" "CMAKE_BUILD_PARALLEL_LEVEL=$(nproc)" \
    "$python" -m pip install --verbose --no-build-isolation --no-deps . && engine_here build.log
}

device_tests=("$python" -m pytest -p no:cacheprovider -o addopts= -o faulthandler_timeout=30
  tests/engines/test_cuda_device.py)

part_tests() {
  local selection result=0
  engine_here tests.log || return 1
  for selection in 'step' 'cooperative' 'cluster' 'not step and not cooperative and not cluster'; do
    run tests.log "${device_tests[@]}" -v -rs --durations=5 -k "$selection" || result=1
  done
  return "$result"
}

part_sanitizer() {
  local tool result=0 only=()
  command -v compute-sanitizer >/dev/null || PATH=/usr/local/cuda/bin:$PATH
  if ! ((dry)) && ! command -v compute-sanitizer >/dev/null; then
    printf 'there is no compute-sanitizer\n' | tee -a "$out/sanitizer.log"
    return 1
  fi
  engine_here sanitizer.log || return 1
  # Of torch's own kernels nothing is asked.
  if compute-sanitizer --help 2>&1 | grep -q -e '--kernel-name '; then
    only=(--kernel-name kns=mmixer)
  fi
  for tool in memcheck racecheck; do
    run sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "${only[@]}" \
      "${device_tests[@]}" -v -k 'test_small and (bfloat16 or float32-high)' || result=1
  done
  return "$result"
}

measure() { # PART FILE [PYTEST'S ARGUMENTS]
  run "$1.log" env "MMIXER_COMMIT=$commit" "$python" -m pytest -p no:cacheprovider -o addopts= \
    "benchmarks/$2" --benchmark-only -v -rs --budget 0.4 --results "$out/$1.json" "${@:3}"
}

part_benchmarks() {
  engine_here benchmarks.log && measure benchmarks engines/bench_cuda.py -k 'not compiled'
}

part_compiled() {
  engine_here compiled.log &&
    measure compiled engines/bench_cuda.py -k compiled --compile-limit 100
}

part_triton() {
  local result=0
  run triton.log "$python" -m pytest -p no:cacheprovider -o addopts= -o faulthandler_timeout=60 \
    tests/engines/test_triton.py -v -rs -k 'not compile and not spill' || result=1
  measure triton engines/bench_triton.py || result=1
  return "$result"
}

part_network() {
  measure network bench_network.py
}

part_table() {
  local files=() name
  for name in benchmarks compiled triton network; do
    if [[ -s $out/$name.json ]]; then files+=("$out/$name.json"); fi
  done
  if ((dry)); then
    printf '  would print the table of %s/{benchmarks,compiled,triton,network}.json\n' "$out"
    return 0
  fi
  if ((${#files[@]} == 0)); then
    printf 'nothing was measured\n' | tee "$out/table.txt"
    return 1
  fi
  timeout 30 "$python" benchmarks/gpu_table.py "${files[@]}" |
    tee "$out/table.txt"
}

# What a part leaves: remembered where it succeeded, brought back where it need not run again.
files_of() {
  case $1 in
    benchmarks | compiled | triton | network) printf '%s\n' "$1.log" "$1.json" ;;
    table) printf 'table.txt\n' ;;
    *) printf '%s\n' "$1.log" ;;
  esac
}

copy() {
  local name
  mkdir -p "$3"
  while read -r name; do
    if [[ -f $2/$name ]]; then cp "$2/$name" "$3/$name"; fi
  done < <(files_of "$1")
}

is_done() {
  local kept
  kept=$memory/$(key_of "$1")/$1
  [[ $1 != table && -e $kept/done ]] || return 1
  ((again == 0 && ${#chosen[@]} == 0)) || return 1
  # An extension that somebody removed has to be built again.
  [[ $1 != build || -n $(compgen -G 'mmixer_kernels/_native*.so') ]] || return 1
}

mkdir -p "$out" || exit 2
printf 'commit %s; GPU %s; %s\n' "${commit:-unknown}" "${gpu:-none}" "results in $out"
for part in "${parts[@]}"; do
  wanted "$part" || continue
  kept=$memory/$(key_of "$part")/$part
  if is_done "$part"; then
    printf '%s: done before\n' "$part"
    ((dry)) || copy "$part" "$kept" "$out"
    continue
  fi
  printf '%s\n' "$part:"
  start=$SECONDS
  if ! ((dry)); then
    while read -r name; do rm -f "$out/$name"; done < <(files_of "$part")
    rm -f "$kept/done"
  fi
  if "part_$part"; then
    verdict=passed
    if ! ((dry)); then
      copy "$part" "$out" "$kept"
      touch "$kept/done"
    fi
  else
    verdict=FAILED status=1
  fi
  ((dry)) || printf '%s: %s, %s s\n' "$part" "$verdict" "$((SECONDS - start))"
  if [[ $verdict == FAILED && $part != table && -f $out/$part.log ]]; then
    tail -n 15 "$out/$part.log" | sed 's/^/    /'
  fi
done
exit "$status"
