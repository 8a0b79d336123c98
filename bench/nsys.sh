#!/usr/bin/env bash
# Profiles training under NVIDIA's nsys, and sums what ran: bench/nsys.sh [-o OUT] [TRAIN OPTIONS...]
#
# Runs `python -m radam_kernels train` (30 steps of each optimizer, unless told otherwise) and prints
# the GPU's kernels and the stages of our steps (radam_kernels.plan, .update) by their time.
# OUT.nsys-rep (radam_nsys) opens in Nsight Systems. PYTHON chooses the interpreter.
set -euo pipefail

PYTHON=${PYTHON:-python3}
out=radam_nsys
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '/^set/q; 2,$s/^#\( \|$\)//p' "${BASH_SOURCE[0]}" && exit
elif [[ ${1:-} == -o ]]; then
  out=${2:?-o: expected a name for the report} && shift 2
fi

command -v nsys >/dev/null || {
  echo "nsys is not on PATH: install NVIDIA Nsight Systems; python -m bench.step_profile needs none" >&2
  exit 3
}
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "$PYTHON finds no GPU through torch; python -m bench.step_profile profiles on the CPU" >&2
  exit 3
}
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
nsys profile --trace=cuda,nvtx --force-overwrite=true --output="$out" \
  "$PYTHON" -m radam_kernels train --device cuda --steps 30 --out "$runs" "$@"
nsys stats --force-export=true --report cuda_gpu_kern_sum --report nvtx_sum "$out.nsys-rep"
