#!/usr/bin/env bash
# Check and measure on a GPU: tests first, then speed. Resumable: what is done for this commit is not done again, step by
# step, test file by test file and benchmark case by case. DIR/verify.json is whole after every step.
#
#   tools/gpu/verify.sh [--out DIR] [--continue DIR] [--wheels DIR] [--minutes M] [--only STEP,...] [--again]
#
#   --out DIR      where verify.json, bench.txt and logs.tar.gz go (default: $OUT, else gpu-verify)
#   --continue DIR what an earlier call wrote (its logs.tar.gz), for a machine that has forgotten it
#   --wheels DIR   wheels to lay beside this Python, for machines without network: pytest and what it needs, and
#                  megatron-core and what it needs for the training step (README.md)
#   --minutes M    time for everything, 9 by default; what no longer fits is reported as not run
#   --only a,b     only these steps: machine build tests bench sanitize train decode
#   --again        forget what is done
#   --rehearse     the same steps at toy size in Triton's interpreter, on a machine without a GPU: shows that the script
#                  runs, and nothing about a GPU
#   CASES=a,b      in the environment: only these kinds of benchmark cases
#
# Exit code: 0 every step passed or had a reason not to run, 1 a step failed, 2 wrong usage or no GPU.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

out=${OUT:-gpu-verify} before="" wheels="" minutes=9 only="machine,build,tests,bench,sanitize,train,decode" again="" rehearse=""
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2 ;;
    --continue) before=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --minutes) minutes=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    --again) again=1; shift ;;
    --rehearse) rehearse=1; shift ;;
    -h|--help) sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "verify.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
done
for name in ${only//,/ }; do
  case $name in machine|build|tests|bench|sanitize|train|decode) ;; *) echo "verify.sh: --only $name; steps are machine, build, tests, bench, sanitize, train, decode" >&2; exit 2 ;; esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
state=${STATE:-build/gpu-verify} # git ignores build/, so a later call finds what is done
mkdir -p "$state" && state=$(cd "$state" && pwd)
[ -n "$again" ] && rm -rf "${state:?}"/*
if [ -n "$before" ]; then
  tar -xzf "$before/logs.tar.gz" -C "$state" 2>/dev/null \
    || { echo "verify.sh: --continue $before holds no logs.tar.gz of an earlier call" >&2; exit 2; }
  cp "$before"/bench.* "$state/" 2>/dev/null # may hold more than the archive, if the call was cut off in the benchmark
fi
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
# Beside the state, so that a later call on this machine compiles and tunes nothing again.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$state/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$state/inductor}
export TRITON_CACHE_AUTOTUNING=1
if [ -n "$rehearse" ]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
    || { echo "verify.sh: $python finds no CUDA GPU through torch; --rehearse runs without one" >&2; exit 2; }
fi
if [ -n "$wheels" ]; then
  ls "$wheels"/*.whl >/dev/null 2>&1 || { echo "verify.sh: --wheels $wheels holds no .whl files" >&2; exit 2; }
  site=$state/site
  if [ ! -f "$site/.whole" ]; then
    rm -rf "$site"
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl \
      || { echo "verify.sh: the wheels of $wheels cannot be installed for $python" >&2; exit 2; }
    touch "$site/.whole"
  fi
  export PYTHONPATH="$PYTHONPATH:$site"
fi
case ",$only," in *,tests,*|*,train,*)
  "$python" -c 'import pytest' 2>/dev/null \
    || { echo "verify.sh: $python has no pytest; carry its wheels with --wheels DIR (see tools/gpu/README.md)" >&2; exit 2; } ;;
esac
deadline="" in_parts=""
"$python" -c 'import pytest_timeout' 2>/dev/null && deadline="--timeout=200"
"$python" -c 'import xdist' 2>/dev/null && in_parts="-n 4 --dist load"
# With the sum of what is checked: a tree that is not committed, or a copy without .git, is another one. Python writes its
# caches under passing names and renames them.
sum=$(find kernels megatron_medgpt tests/kernels tools/gpu -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c1-12)
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)+$sum${rehearse:+-rehearsal}
started=$SECONDS
# First those that the benchmark waits for, the rest after it. Not the tests of this script and of compiling without a GPU.
tests="rounding mx route routed_mlp weight_grads permute fused_projector cross_entropy"
more_tests="bad_input grouped_mlp alone sink_attention branched_and_cached model_slots kept_memory"
# What is compiled for longest is spread over processes.
spread="route routed_mlp permute fused_projector"
[ -n "$rehearse" ] && tests=rounding more_tests=""

left() { echo $((minutes * 60 - (SECONDS - started))); }

wanted() { case ",$only," in *",$1,"*) ;; *) return 1 ;; esac; }
passed() { grep -q "\"commit\": \"$commit\", \"status\": \"passed\"" "$state/$1.step" 2>/dev/null; }

# run NAME LIMIT_S COMMAND...: the command with its output in NAME.log, and NAME.step, one JSON object, in $state.
run() {
  local name=$1 limit=$2; shift 2
  if passed "$name"; then echo "$name: done before"; return 0; fi
  if [ "$(left)" -lt 20 ]; then note "$name" "not run" "no time left of $minutes minutes" 0; return 0; fi
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  echo "$name: running (at most $limit s)"
  local began=$SECONDS code=0
  timeout -k 10 "$limit" "$@" >"$state/$name.log" 2>&1 || code=$?
  local status=passed why=""
  case $code in
    0) ;;
    75) status=partly; why=$(tail -n 1 "$state/$name.log") ;;
    5|77) status="not run"; why=$(tail -n 1 "$state/$name.log") ;;
    124|137) status=failed; why="stopped after $limit s" ;;
    *) status=failed; why="exit code $code: $(tail -n 1 "$state/$name.log" | cut -c1-200)" ;;
  esac
  note "$name" "$status" "$why" $((SECONDS - began))
}

step() { wanted "$1" && { run "$@"; summary; }; return 0; }

note() {
  "$python" - "$state/$1.step" "$commit" "$2" "$1" "$3" "$4" <<'PY'
import json, os, sys
path, commit, status, name, why, seconds = sys.argv[1:]
with open(f"{path}.part", "w") as file:
    json.dump({"commit": commit, "status": status, "step": name, "why": why, "seconds": int(seconds)}, file)
os.replace(f"{path}.part", path)
PY
  echo "$1: $2 ${3:+($3)}"
}

# Everything so far, in $out: a call that is cut off has written what it did.
summary() {
  [ -e "$out/bench.json" ] || cp "$state"/bench.* "$out/" 2>/dev/null
  tar -czf "$out/.logs" --exclude ./site --exclude ./triton --exclude ./inductor --exclude '*.part' -C "$state" . 2>/dev/null
  mv "$out/.logs" "$out/logs.tar.gz" # at once: whoever is killed leaves the old file or the new
  "$python" - "$state" "$out" <<'PY'
import json, os, pathlib, sys
state, out = map(pathlib.Path, sys.argv[1:])
steps = [json.loads(path.read_text()) for path in sorted(state.glob("*.step"))]
summary = {"steps": steps, "passed": all(s["status"] != "failed" for s in steps)}
for name, folder in (("machine", state), ("decoders", state), ("bench", out)):
    if (folder / f"{name}.json").exists():
        summary[name] = json.loads((folder / f"{name}.json").read_text())
(out / ".verify").write_text(json.dumps(summary, indent=1) + "\n")
os.replace(out / ".verify", out / "verify.json")
PY
}

# Test files next to one another: compiling takes most of the time, and the machine has more cores than one file uses.
# Not the mutants, which are compiled anew each and show that the tests see, not that the kernels are right.
files_of_tests() {
  local name more workers=$(( ($(nproc) + 1) / 2 )) pids=()
  for name in $1; do
    more=""
    case " $spread " in *" $name "*) more=$in_parts ;; esac
    # shellcheck disable=SC2086  # a list of words
    run "tests-$name" 280 "$python" -m pytest -p no:cacheprovider "tests/kernels/test_$name.py" -q --maxfail 5 \
      --durations 5 -k "not mutant and not every_schedule_gives" $more ${deadline:+"$deadline"} \
      --junitxml "$state/tests-$name.xml" &
    pids+=($!)
    while [ "$(running "${pids[@]}")" -ge "$workers" ]; do sleep 1; summary; done
  done
  while [ "$(running "${pids[@]}")" -gt 0 ]; do sleep 2; summary; done
}

running() {
  local pid count=0
  for pid in "$@"; do kill -0 "$pid" 2>/dev/null && count=$((count + 1)); done
  echo "$count"
}

# Machine code of what the benchmark launches, made while the tests run and their GPU idles: in the benchmark it would be
# one kernel after the other. Liger's 240 variants too, which it tries on its first call.
ahead=()
compile_ahead() {
  local part parts=$(( ($(nproc) + 3) / 4 ))
  for part in $(seq 0 $((parts - 1))); do
    nice -n 10 timeout 200 "$python" kernels/compile.py --experts 32 --slots 4 --part "$part/$parts" >"$state/ahead-$part.log" 2>&1 &
    ahead+=($!)
    nice -n 10 timeout 200 "$python" kernels/compile.py --liger --part "$part/$parts" >"$state/ahead-liger-$part.log" 2>&1 &
    ahead+=($!)
  done
}
trap '[ ${#ahead[@]} -gt 0 ] && kill "${ahead[@]}" 2>/dev/null' EXIT

# Kinds of benchmark cases whose tests have passed ("yes"), or not ("no"). The benchmark holds every case to the reference
# itself before it times it; what has not passed its tests is measured last, and no goal is judged by it.
kinds() {
  local kind needed name found
  while read -r kind needed; do
    [ -n "$rehearse" ] && needed=rounding
    found=yes
    for name in $needed; do passed "tests-$name" || found=no; done
    [ "$found" = "$1" ] || continue
    case ",${CASES:-$kind}," in *",$kind,"*) printf '%s,' "$kind" ;; esac
  done <<'KINDS'
moe rounding mx route permute routed_mlp
schedules rounding mx route permute routed_mlp
products rounding mx route permute routed_mlp
frozen rounding mx route permute routed_mlp
conversions rounding mx
movement rounding route permute
projector rounding fused_projector
liger rounding route permute routed_mlp
KINDS
}

step machine 60 bash -c "command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv; $python tools/gpu/machine.py --out '$state/machine.json'"
[ -z "$rehearse" ] && wanted bench && ! passed bench && compile_ahead
step build 120 "$python" -c "
import pathlib
from medgpt_kernels import nvcc
from medgpt_kernels.mx import cuda
import sys
if nvcc.find() is None:
    print('nvcc is not on the PATH'); sys.exit(77)
print(nvcc.load(cuda.SOURCE))"
# tests_of STEP FILES
tests_of() {
  local name bad="" missing="" began=$SECONDS
  wanted tests && [ -n "$2" ] || return 0
  files_of_tests "$2"
  for name in $2; do
    passed "tests-$name" && continue
    if grep -q '"status": "not run"' "$state/tests-$name.step"; then missing="$missing $name"; else bad="$bad $name"; fi
  done
  if [ -n "$bad" ]; then note "$1" failed "failed:$bad${missing:+; not run:$missing}" $((SECONDS - began))
  else note "$1" passed "${missing:+not run:$missing}" $((SECONDS - began)); fi
  summary
}

tests_of tests "$tests"
if wanted bench; then
  ready=$(kinds yes) unproven=$(kinds no)
  all=$ready$unproven
  if [ -n "$all" ]; then
    cp "$state"/bench.* "$out/" 2>/dev/null # what is measured already; the rest is written beside it, case by case
    # A case that begins at the last moment takes a minute.
    step bench $(( $(left) > 40 ? $(left) - 15 : 25 )) "$python" kernels/bench.py --out "$out" ${rehearse:+--tiny} \
      --only "${all%,}" --unproven "${unproven%,}" --commit "$commit" --seconds $(( $(left) > 150 ? $(left) - 90 : 60 ))
    cp "$out"/bench.* "$state/" 2>/dev/null
    if passed bench && [ -n "$unproven" ]; then
      note bench partly "measured, but the tests of these have not passed: ${unproven%,}" 0
    fi
  fi
fi
tests_of more-tests "$more_tests"
step sanitize 120 bash tools/gpu/sanitize.sh "$python"
step train 180 bash tools/gpu/train_small.sh "$python" "$state"
step decode 90 "$python" tools/gpu/decoders.py --out "$state/decoders.json" ${rehearse:+--rehearse}

summary
"$python" - "$out" <<'PY'
import json, pathlib, sys
found = json.loads((pathlib.Path(sys.argv[1]) / "verify.json").read_text())
for s in found["steps"]:
    print(f"{s['step']:26} {s['status']:8} {s['seconds']:4} s  {s['why']}")
sys.exit(not found["passed"])
PY
