#!/usr/bin/env bash
# Everything about CUDA in at most ten minutes: bash tests/gpu/prove.sh OUT
# The tests, then the table of `syncbn bench --check`, both with all that they wrote in OUT. Exit code 0: all holds.
# Without a CUDA device it rehearses, in up to an hour: the tests in Triton's interpreter, the bench on the CPU with small
# inputs.
set -uo pipefail
out=$(mkdir -p "${1:?is not given: the folder for the results}" && cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} failed=()

# part NAME SECONDS COMMAND...: its output in OUT/NAME.log. When its time is over it is interrupted: pytest then reports
# what it has.
part() {
  local began=$SECONDS
  timeout -s INT -k 15 "$2" "${@:3}" >"$out/$1.log" 2>&1 </dev/null
  local code=$?
  ((code == 0)) || failed+=("$1")
  echo "== $1: exit code $code after $((SECONDS - began)) s"
}

bench=(--check --device cuda --rounds 7) total=570 tests=260
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  bench=(--device cpu --shapes tiny --rounds 3) total=3600 tests=3000
  export TRITON_INTERPRET=1
fi
# Most of the tests' time is compilation, on the host.
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))") || workers=()

part tests "$tests" "$python" -m pytest tests/gpu -v -p no:cacheprovider "${workers[@]}" \
  --junitxml="$out/tests.xml" --durations=15
part bench "$((total - SECONDS))" "$python" -m syncbn bench --out "$out" "${bench[@]}"

tail -n 40 "$out/tests.log"
sed -n '/^SyncBatchNorm\|^CPU\|^CUDA\|^saved/,$p' "$out/bench.log" | tail -n 45
echo "== results in $out; ${failed[*]:+failed: }${failed[*]:-all parts passed}"
((${#failed[@]} == 0))
