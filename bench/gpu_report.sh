#!/usr/bin/env bash
# All that needs a GPU, in stages of less than eight minutes: bench/gpu_report.sh --stage build, ...
#
#   --stage build     the kernels, for this GPU's architecture only
#           test      the whole test suite, with the GPU
#           sanitize  compute-sanitizer's memcheck, racecheck and initcheck on the tests so named
#           time      bench/gpu_time.py: JSON, rewritten after each case
#           tune      bench/gpu_tune.py: variants of the kernels; not part of all
#           ncu nsys  what the profilers say of one step
#           all       one after the other (the default), but for tune
#   --out DIR         for logs and results (bench/results/<device>)
#   --dry-run         tries each stage without a GPU, in seconds
#
# It needs no network. DIR/report.txt has a line for each stage: what came of it, seconds, why.
# PYTHON (python3) chooses the interpreter; RADAM_COMMIT names the commit of a tree without history.
# shellcheck disable=SC2329 # the stages are called by name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

LIMIT=480 # seconds for a stage
PYTHON=${PYTHON:-python3}
STAGES="build test sanitize time tune ncu nsys"
stage=all out="" dry=""
while (($#)); do
  case $1 in
    --stage) stage=${2:?--stage: expected a name} && shift ;;
    --out) out=${2:?--out: expected a folder} && shift ;;
    --dry-run) dry=1 ;;
    -h | --help) sed -n '/^# shell/q; 2,$s/^#\( \|$\)//p' "${BASH_SOURCE[0]}" && exit ;;
    *) echo "$1: expected --stage, --out or --dry-run" >&2 && exit 2 ;;
  esac
  shift
done
[[ $stage == all ]] || [[ " $STAGES " == *" $stage "* ]] || {
  echo "--stage: expected all or one of $STAGES, got $stage" >&2
  exit 2
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PATH=$PATH:/usr/local/cuda/bin
[[ $dry ]] && export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
if [[ -z $out ]]; then
  if [[ $dry ]]; then
    out=$(mktemp -d)
  else
    out=$("$PYTHON" -m bench.folders) || {
      echo "$PYTHON finds no GPU through torch; --dry-run tries this without one" >&2
      exit 2
    }
  fi
fi
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)

# Each stage runs with its output in a log, and ends by one of these.
ok() { status=ok reason=$*; }
failed() { status=failed reason=$*; }
skipped() { status=skipped reason=$*; }

limited() { # SECONDS COMMAND...: as long as the stage has left, at most
  local left=$((LIMIT - SECONDS + begin)) most=$1
  shift
  ((left > 0)) || return 124
  timeout --kill-after=10 "$((left < most ? left : most))" "$@"
}

last() { # FILE PATTERN: the last line that matches, as one short line
  grep -aE "$2" "$1" | tail -n 1 | tr -s '[:space:]' ' ' | sed 's/ $//' | cut -c1-200
}

why() { # STATUS FILE: what a command that failed said
  if (($1 == 124 || $1 == 137)); then
    echo "out of time"
  else
    echo "exit status $1: $(last "$2" '[^[:space:]]')"
  fi
}

stage_build() {
  local tools="" tool log=$out/build.log
  for tool in "$PYTHON" cmake ninja nvcc; do
    command -v "$tool" || tools+=" $tool"
  done
  for tool in torch triton pybind11 pytest numpy; do
    "$PYTHON" -c "import $tool; print('$tool', $tool.__version__)" || tools+=" $tool"
  done
  if [[ $dry ]]; then
    ok "dry run: nothing built; missing:${tools:- nothing}"
    return
  fi
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())') ||
    { failed "torch finds no GPU" && return; }
  export RADAM_CUDA_ARCHS=$arch
  local way="pip install -e ."
  if ! limited 300 "$PYTHON" -m pip install -e . --no-build-isolation --no-deps; then
    # An old setuptools, a read-only or externally managed Python: the tree itself serves too.
    way="cmake into the tree, after pip failed: $(last "$log" '[Ee]rror')"
    local python
    python=$(command -v "$PYTHON")
    limited 300 cmake --fresh -S . -B "$out/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DPython_EXECUTABLE="$python" -DCMAKE_INSTALL_PREFIX="$PWD/radam_kernels" \
      -DRADAM_CUDA_ARCHS="$arch" &&
      limited 300 cmake --build "$out/cmake" --target install
    local rc=$?
    rm -rf "$out/cmake"
    ((rc == 0)) || { failed "$(why "$rc" "$log")" && return; }
  fi
  limited 200 "$PYTHON" -m radam_kernels doctor
  local healthy=$?
  "$PYTHON" -c 'import radam_kernels, sys; sys.exit(radam_kernels.available_backends()["cuda"])' ||
    { failed "built by $way, but cuda does not work: $(last "$log" .)" && return; }
  ((healthy == 0)) || { failed "$(last "$log" 'WRONG')" && return; }
  ok "$way, for $arch"
}

stage_test() {
  local log=$out/test.log ignored=() words="" ours="" rc file package gpu_tests
  shopt -s nullglob
  gpu_tests=(tests/test_gpu*.py)
  while read -r file package; do
    ignored+=("--ignore=$file") words+=" $(basename "$file") ($package)"
  done < <("$PYTHON" -m bench.missing_imports tests)
  local pytest=("$PYTHON" -m pytest -p no:cacheprovider --continue-on-collection-errors)
  if [[ $dry ]]; then
    limited 60 "${pytest[@]}" "${ignored[@]}" --collect-only -q "${gpu_tests[@]}"
    rc=$?
  else
    # Verbose, so that what has run is told where time runs out. The GPU's own tests come first:
    # pytest would sort them among the others.
    local others=() rc_others
    for file in "${gpu_tests[@]}"; do others+=("--ignore=$file"); done
    limited "$LIMIT" "${pytest[@]}" "${ignored[@]}" -v --tb=short --durations=10 \
      --junitxml="$out/tests-gpu.xml" "${gpu_tests[@]}"
    rc=$? ours="; the GPU's own: $(last "$log" 'passed|failed|error' | tr -d =)"
    limited "$LIMIT" "${pytest[@]}" "${ignored[@]}" "${others[@]}" -v --tb=short --durations=10 \
      --junitxml="$out/tests.xml" tests
    rc_others=$?
    ((rc != 0)) || rc=$rc_others
  fi
  words="$ours${words:+; left out for want of a package:$words}"
  if ((rc == 0)); then
    ok "$(last "$log" 'passed|collected' | tr -d =)$words"
  elif ((rc == 124 || rc == 137)); then
    failed "out of time after $(grep -c ' PASSED ' "$log") passed, $(grep -c ' FAILED ' "$log") failed$words"
  else
    failed "$(last "$log" 'passed|failed|error' | tr -d = || why "$rc" "$log")$words"
  fi
}

stage_sanitize() {
  local tool summary all="" any_failed=""
  local refusal='^=========.*(not supported|Unable to (attach|find|connect|init)|Failed to init)'
  if ! command -v compute-sanitizer; then
    skipped "compute-sanitizer is not here" && return
  elif [[ $dry ]]; then
    skipped "dry run: compute-sanitizer needs a GPU" && return
  fi
  # torch's allocator would hide what is out of a tensor's bounds but inside of its pool.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    limited 150 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 86 \
      "$PYTHON" -m pytest -p no:cacheprovider -v -k sanitize tests/test_gpu.py >"$out/$tool.log" 2>&1
    local rc=$?
    cat "$out/$tool.log"
    summary=$(last "$out/$tool.log" 'ERROR SUMMARY|RACECHECK SUMMARY')
    if grep -qaE "$refusal" "$out/$tool.log"; then
      all+="; $tool skipped: $(last "$out/$tool.log" "$refusal")"
    elif ((rc == 5)) || grep -qaE 'file or directory not found|collected 0 items' "$out/$tool.log"; then
      all+="; $tool skipped: no test is named sanitize"
    elif ((rc == 0)) && [[ $summary ]]; then
      all+="; $tool ok: $(last "$out/$tool.log" passed)"
    elif ((rc == 0)); then
      all+="; $tool skipped: it gave no summary"
    else
      any_failed=1 all+="; $tool failed, $(why "$rc" "$out/$tool.log") $summary"
    fi
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  all=${all#; }
  if [[ $any_failed ]]; then
    failed "$all"
  elif [[ $all == *" ok: "* ]]; then
    ok "$all"
  else
    skipped "$all"
  fi
}

stage_time() {
  local log=$out/time.log rc
  if [[ $dry ]]; then
    limited 60 "$PYTHON" -m bench.gpu_time --dry-run --out "$out" --seconds 0.1 \
      --only '^2\^(26|28) |GPT-2'
    rc=$?
  else
    # Less than the limit: it then says itself what it lacked time for.
    limited "$LIMIT" "$PYTHON" -m bench.gpu_time --out "$out" --minutes 7
    rc=$?
  fi
  if ((rc == 0)); then ok "$out/gpu.json"; else failed "$(why "$rc" "$log")"; fi
}

stage_tune() {
  local log=$out/tune.log rc
  if [[ $dry ]]; then
    limited 90 "$PYTHON" -m bench.gpu_tune --dry-run --out "$out" --seconds 0.1
    rc=$?
  else
    limited "$LIMIT" "$PYTHON" -m bench.gpu_tune --out "$out" --minutes 7
    rc=$?
  fi
  if ((rc == 0)); then ok "$out/tune.json"; else failed "$(why "$rc" "$log")"; fi
}

profile() { # TOOL COMMAND...: one step of our kernels under a profiler
  local tool=$1 log=$out/$1.log case
  if ! command -v "$tool"; then
    skipped "$tool is not here" && return
  elif [[ $dry ]]; then
    skipped "dry run: $tool needs a GPU" && return
  fi
  for case in "2^28 float32" "2^28 bfloat16"; do
    if ! limited 200 "$@" "$PYTHON" -m bench.gpu_time --once "$case"; then
      skipped "$(last "$log" '==ERROR==|[Ee]rror' || why 1 "$log")"
      return
    fi
  done
  ok "$log"
}

stage_ncu() {
  # Clocks are left alone: others may share this GPU.
  local metrics=dram__bytes.sum.per_second,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,gpu__time_duration.sum,launch__registers_per_thread
  profile ncu --clock-control none --target-processes all --profile-from-start off -k regex:radam_step_kernel \
    --metrics "$metrics"
  [[ $status != ok ]] || grep -q dram__throughput "$out/ncu.log" ||
    skipped "ncu ran and saw no radam_step_kernel: $(last "$out/ncu.log" '==ERROR' || last "$out/ncu.log" '==')"
}

stage_nsys() {
  profile nsys profile --trace=cuda --stats=true --force-overwrite=true --output="$out/nsys"
}

any=0
for name in $STAGES; do
  [[ $stage == all && $name != tune || $stage == "$name" ]] || continue
  echo "$name ..."
  begin=$SECONDS status=failed reason="it ended without a word"
  "stage_$name" >"$out/$name.log" 2>&1
  line=$(printf '%s\t%s\t%d s\t%s' "$name" "$status" $((SECONDS - begin)) "$reason")
  echo "$line"
  # Written as it arrives, in place of what an earlier run said of this stage.
  { grep -sv "^$name"$'\t' "$out/report.txt"; echo "$line"; } >"$out/report.new"
  mv "$out/report.new" "$out/report.txt"
  [[ $status != failed ]] || any=1
done
[[ ! $dry ]] || echo "dry run; logs in $out"
exit $any
