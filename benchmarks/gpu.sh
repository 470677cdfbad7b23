#!/usr/bin/env bash
# The tables that need a card: memory and time at full size, and the quality bench on a pair pretrained on the spot.
#
#   benchmarks/gpu.sh           every part in its order
#   benchmarks/gpu.sh PART ...  these parts; --list names them
#
# Nothing is downloaded. A part takes 9 minutes at most; one that did not end says so, and goes on when it is called
# again. Results are JSON and Markdown under OUT; everything else (the pair, runs, pictures) is under WORK, which the
# later parts need: quality reads the pair that the pretrain parts left there.
#
#   PYTHON  an interpreter with torch for CUDA and plugbridge's dependencies (python3); wheels of what it lacks may
#           lie in WORK/wheels
#   OUT     docs/results/gpu      WORK  runs/gpu
#   DATA    the texts (see pairs/README.md): a directory ($PLUGBRIDGE_DATA), else what `pack` wrote, WORK/text.tar.xz
#   JOBS    runs of the quality bench at a time (6)
#   GPU_REHEARSAL=1  every part on the CPU at a size of seconds; the tests do this
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

parts="check memory-gpt2-xl memory-t5-3b memory-t5-11b memory-check steps pretrain-small pretrain-large quality quality-methods"
list() {
  cat <<'EOF'
check            the card and the packages, as JSON; installs WORK/wheels; the other parts begin with it
memory-gpt2-xl   bench memory on GPT2-XL's shape; what does not fit is predicted and marked
memory-t5-3b     the same on T5-3B's
memory-t5-11b    the same on T5-11B's
memory-check     predicted beside measured at three small sizes
steps            a feedback step against LoRA steps on GPT2-XL's shape, taking turns
pretrain-small   GPT-2-shaped, 20 million parameters, in bf16
pretrain-large   GPT-2-shaped, 120 million parameters, in bf16
quality          the quality bench on that pair: LoRA, two tasks, three seeds
quality-methods  the same for adapters and prefixes
pack             not on the card: the texts in one file, WORK/text.tar.xz, to take there
EOF
}

fail() { echo "error: $*" >&2; exit 2; }
absolute() { mkdir -p "$1" && (cd "$1" && pwd); }

python=${PYTHON:-python3}
case "${1:-}" in -h | --help | --list) list; exit ;; esac
for part in "$@"; do
  case " $parts pack " in *" $part "*) ;; *) fail "no part '$part'; known: $parts pack" ;; esac
done
command -v "$python" >/dev/null || fail "$python not found; set PYTHON"
OUT=$(absolute "${OUT:-$ROOT/docs/results/gpu}")
WORK=$(absolute "${WORK:-$ROOT/runs/gpu}")
cd "$ROOT"
export PYTHONPATH="$ROOT/src:$WORK/site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 MPLBACKEND=Agg

seconds=510 # of a part's work; what is left of 9 minutes is for starting and writing
if [ -n "${GPU_REHEARSAL:-}" ]; then
  device=cpu dtypes=bfloat16
  tiny_model="--width 16 --heads 2 --layers 1 --inner 32 --tokens 3000 --rows 4 --vocabulary 512 --pieces 50 --warmup 1000 --workers 1"
  tiny_steps="--hidden 64 --layers 2 --batch 1 --length 16 --steps 2 --rounds 1 --here"
  tiny_runs="--set device=cpu --set tune.steps=1 --set couple.steps=1 --set ceiling.steps=1 --set score.samples=2
    --set evaluate.limit=8 --set evaluate.split=validation --set tune.batch_size=2 --set couple.batch_size=2
    --set ceiling.batch_size=2 --set prune.budget=0.9"
  groups=-wordnet-kind-s0
else
  device=cuda dtypes="float32 bfloat16" tiny_model="" tiny_steps="" tiny_runs="" groups=-
fi

plugbridge() { "$python" -W ignore -m plugbridge "$@"; }

publish() { # FILE NAME: a page and its JSON to OUT
  cp "$1.json" "$OUT/$2.json"
  cp "$1.md" "$OUT/$2.md"
}

check() {
  if compgen -G "$WORK/wheels/*.whl" >/dev/null && [ ! -d "$WORK/site" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$WORK/site" "$WORK"/wheels/*.whl
  fi
  "$python" benchmarks/machine.py --device "$device" --json "$OUT/machine.json"
}

memory() { # NAME OPTIONS: the counts are kept under WORK and go on from there
  local page="$WORK/$1/memory" minutes=$((seconds / 60 - 1))
  if [ "$device" = cpu ]; then
    [ "$2" = --check ] || set -- "$1" --shapes tiny
    set -- "$@" --budget 1K
    minutes=0
  fi
  plugbridge bench memory "${@:2}" --minutes "$minutes" --threads 4 --table "$page.md" --quiet
  publish "$page" "$1"
}

steps() {
  local dtype
  for dtype in $dtypes; do
    # shellcheck disable=SC2086  # options, split on purpose
    timeout "$((seconds / 2))" "$python" -W ignore benchmarks/step_memory.py --device "$device" --dtype "$dtype" \
      --hidden 1600 --layers 48 --batch 8 --length 512 --steps 6 --rounds 2 $tiny_steps \
      --table "$WORK/steps/$dtype.md" || fail "steps in $dtype did not end; run it again"
    publish "$WORK/steps/$dtype" "steps-$dtype"
  done
}

texts() { # the directory of texts
  local data=${DATA:-${PLUGBRIDGE_DATA:-}}
  if [ -z "$data" ]; then
    data=$WORK/text
    if [ ! -d "$data" ]; then
      [ -f "$WORK/text.tar.xz" ] || fail "no texts; set DATA, or bring $WORK/text.tar.xz, which 'gpu.sh pack' writes"
      "$python" -W ignore -m tarfile -e "$WORK/text.tar.xz" "$data.part"
      mv "$data.part" "$data"
    fi
  fi
  echo "$data"
}

pretrain() { # SIZE RECIPE
  local data
  data=$(texts)
  # shellcheck disable=SC2086  # options, split on purpose
  "$python" -W ignore pairs/pretrain.py "$2" --data "$data" --out "$WORK/pairs" --device "$device" --dtype bfloat16 \
    --workers 4 --minutes "$((seconds / 60))" --save-every 120 $tiny_model
  cp "$WORK/pairs/gpt2/$1-work/summary.json" "$OUT/pretrain-$1.json"
}

quality() { # NAME METHOD...: runs go on where they were; what is finished is written
  local pair="$WORK/pairs/gpt2" name=$1 only=() size method status=0
  for method in "${@:2}"; do only+=(--only "$method$groups"); done
  for size in small large; do
    [ -f "$pair/$size/config.json" ] || fail "no $pair/$size; run pretrain-$size first"
  done
  # shellcheck disable=SC2086  # options, split on purpose
  set -- configs/quality_gpu.yaml --full "${only[@]}" --set "small=$pair/small" --set "large=$pair/large" $tiny_runs \
    --out "$WORK/quality" --table "$WORK/$name.md" --quiet
  timeout "$seconds" "$python" -W ignore -m plugbridge bench quality "$@" --jobs "${JOBS:-6}" || status=$?
  if [ "$status" = 124 ]; then
    plugbridge bench quality "$@" --summary
    echo "$name: runs are left; run it again"
  elif [ "$status" != 0 ]; then
    exit "$status"
  fi
  publish "$WORK/$name" "$name"
}

pack() {
  local data=${DATA:-${PLUGBRIDGE_DATA:-}}
  [ -d "$data" ] || fail "no texts; set DATA or PLUGBRIDGE_DATA to their directory"
  (cd "$data" && "$python" -m tarfile -c "$WORK/text.tar.xz" wordnet/synsets.jsonl \
    pretrain_wordnet/wordnet_glosses_examples.txt pretrain_enwiki_part pretrain_classics_easy \
    pretrain_fairytales/fairytales_train.txt)
  echo "$WORK/text.tar.xz: $(($(wc -c <"$WORK/text.tar.xz") / 1000000)) MB"
}

run() {
  case "$1" in
    check | pack) ;;
    *) check ;;
  esac
  case "$1" in
    check | steps | pack) "$1" ;;
    memory-check) memory "$1" --check ;;
    memory-*) memory "$1" --shapes "${1#memory-}" ;;
    pretrain-small) pretrain small gpt2-20m ;;
    pretrain-large) pretrain large gpt2-120m ;;
    quality) quality "$1" lora ;;
    quality-methods) quality "$1" adapter prefix ;;
  esac
}

# shellcheck disable=SC2086  # names, split on purpose
[ $# -gt 0 ] || set -- $parts
for part in "$@"; do
  echo "== $part"
  run "$part"
done
