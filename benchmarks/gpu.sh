#!/usr/bin/env bash
# The tables that need a card: memory and time at full size, and the quality bench on a pair pretrained on the spot.
#
#   benchmarks/gpu.sh           every part in its order
#   benchmarks/gpu.sh PART ...  these parts; --list names them
#
# Nothing is downloaded. A part takes 9 minutes at most; one that did not end says so, leaves what it has, and goes on
# when it is called again. Results are JSON and Markdown under OUT; everything else (the pair, runs, pictures) is under
# WORK, which the later parts need: quality reads the pair that the pretrain parts left there. Where WORK is empty, memory
# and steps go on from the results in FROM. A part that fails does not keep the others from running.
#
#   PYTHON  an interpreter with torch for CUDA and plugbridge's dependencies (python3); wheels of what it lacks may
#           lie in WORK/wheels
#   OUT     docs/results/gpu      WORK  runs/gpu      FROM  docs/results/gpu
#   DATA    the texts (see pairs/README.md): a directory ($PLUGBRIDGE_DATA), else what `pack` wrote, WORK/text.tar.xz
#   JOBS    runs of the quality bench at a time (6)
#   LIMIT   seconds of a part's work (510); what is left of 9 minutes is for starting and writing
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
absolute() { case "$1" in "" | /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

case "${1:-}" in -h | --help | --list) list; exit ;; esac
for part in "$@"; do
  case " $parts pack " in *" $part "*) ;; *) fail "no part '$part'; known: $parts pack" ;; esac
done
python=$(command -v "${PYTHON:-python3}") || fail "${PYTHON:-python3} not found; set PYTHON"
python=$(absolute "$python")
data=$(absolute "${DATA:-${PLUGBRIDGE_DATA:-}}")
OUT=$(absolute "${OUT:-$ROOT/docs/results/gpu}")
WORK=$(absolute "${WORK:-$ROOT/runs/gpu}")
FROM=$(absolute "${FROM:-$ROOT/docs/results/gpu}")
mkdir -p "$OUT" "$WORK"
cd "$ROOT"
export PYTHONPATH="$ROOT/src:$WORK/site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 MPLBACKEND=Agg

seconds=${LIMIT:-510}
most=$((64 << 20)) # bytes of a checkout and what goes along with it
if [ -n "${GPU_REHEARSAL:-}" ]; then
  device=cpu dtypes=bfloat16
  tiny_model="--width 16 --heads 2 --layers 1 --inner 32 --tokens 3000 --rows 4 --vocabulary 512 --pieces 50 --warmup 1000 --workers 1"
  tiny_steps="--hidden 64 --layers 2 --vocabulary 2048 --batch 1 --length 16 --steps 2 --rounds 1 --here"
  tiny_runs="--set device=cpu --set tune.steps=1 --set couple.steps=1 --set ceiling.steps=1 --set score.samples=2
    --set evaluate.limit=8 --set evaluate.split=validation --set tune.batch_size=2 --set couple.batch_size=2
    --set ceiling.batch_size=2 --set prune.budget=0.9"
  groups=-wordnet-kind-s0
else
  device=cuda dtypes="float32 bfloat16" tiny_model="" tiny_steps="" tiny_runs="" groups=-
fi

checked=() # what docs/results/plan_accuracy.md measures
for row in "full fine-tuning" "LoRA: train" "checkpointing: train" "Side-Tuning: train" "ours, streamed: " \
  "LoRA, feedback: couple" "LoRA, standalone: couple" "LoRA, feedback, streamed: couple"; do
  checked+=(--only "$row")
done

plugbridge() { "$python" -W ignore -m plugbridge "$@"; }

limited() { timeout --kill-after 10 "$@"; } # SECONDS COMMAND: 124 or 137 if it did not end

publish() { # PAGE NAME: what there is of a page and its JSON, to OUT
  [ ! -e "$1.json" ] || cp "$1.json" "$OUT/$2.json"
  [ ! -e "$1.md" ] || cp "$1.md" "$OUT/$2.md"
}

resume() { # PAGE NAME: begin with the counts of an earlier call; its page comes from all of them, at the end
  mkdir -p "$(dirname "$1")"
  rm -f "$1.md"
  [ -e "$1.json" ] || [ ! -e "$FROM/$2.json" ] || cp "$FROM/$2.json" "$1.json"
}

verdict() { # NAME STATUS
  case "$2" in
    0) ;;
    124 | 137) echo "$1 did not end; run it again" ;;
    *) echo "error: $1 failed with status $2" >&2 && return "$2" ;;
  esac
}

check() {
  if compgen -G "$WORK/wheels/*.whl" >/dev/null && [ ! -d "$WORK/site" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$WORK/site" "$WORK"/wheels/*.whl
  fi
  "$python" benchmarks/machine.py --device "$device" --json "$OUT/machine.json"
}

memory() { # NAME OPTIONS: counts a row after another and goes on from those that are there
  local page="$WORK/$1/memory" minutes=$(((seconds - 90) / 60)) status=0
  if [ "$device" = cpu ]; then
    minutes=0
    case "$2" in
      --check) set -- "$@" --budget 1K ;;
      *) set -- "$1" --shapes tiny --only "ours, streamed, bf16: score (fisher)" ;;
    esac
  fi
  resume "$page" "$1"
  limited "$seconds" "$python" -W ignore -m plugbridge bench memory "${@:2}" --threads 4 --table "$page.md" \
    --minutes "$((minutes > 0 ? minutes : 0))" --out "$WORK/memory" --remove-weights || status=$?
  publish "$page" "$1"
  verdict "$1" "$status"
}

steps() { # the last dtype has what the others leave of the time
  local dtype page left end=$((SECONDS + seconds)) status failed=0
  for dtype in $dtypes; do
    page="$WORK/steps/$dtype" left=$((end - SECONDS)) status=0
    [ "$dtype" = bfloat16 ] || left=$((left / 2))
    resume "$page" "steps-$dtype"
    # shellcheck disable=SC2086  # options, split on purpose
    limited "$((left > 1 ? left : 1))" "$python" -W ignore benchmarks/step_memory.py --device "$device" \
      --dtype "$dtype" --hidden 1600 --layers 48 --vocabulary 50257 --batch 8 --length 512 --steps 6 --rounds 2 \
      $tiny_steps --table "$page.md" || status=$?
    publish "$page" "steps-$dtype"
    verdict "steps in $dtype" "$status" || failed=$status
  done
  return "$failed"
}

texts() { # the directory of texts
  local unpacked=$WORK/text
  if [ -n "$data" ]; then
    echo "$data"
    return
  fi
  if [ ! -d "$unpacked" ]; then
    [ -f "$WORK/text.tar.xz" ] || fail "no texts; set DATA, or bring $WORK/text.tar.xz, which 'gpu.sh pack' writes"
    "$python" -W ignore -m tarfile -e "$WORK/text.tar.xz" "$unpacked.part" >&2
    mv "$unpacked.part" "$unpacked"
  fi
  echo "$unpacked"
}

pretrain() { # SIZE RECIPE
  local texts
  texts=$(texts)
  # shellcheck disable=SC2086  # options, split on purpose
  "$python" -W ignore pairs/pretrain.py "$2" --data "$texts" --out "$WORK/pairs" --device "$device" --dtype bfloat16 \
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
  limited "$seconds" "$python" -W ignore -m plugbridge bench quality "$@" --jobs "${JOBS:-6}" || status=$?
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    plugbridge bench quality "$@" --summary
    echo "$name: runs are left; run it again"
  elif [ "$status" != 0 ]; then
    exit "$status"
  fi
  publish "$WORK/$name" "$name"
}

along() { # bytes of the checkout and of WORK/wheels
  { git ls-files -z --cached --others --exclude-standard; find "$WORK" -path '*/wheels/*.whl' -print0; } |
    { xargs -0 cat 2>/dev/null || true; } | wc -c
}

pack() {
  local text=$WORK/text.tar.xz size all
  [ -d "$data" ] || fail "no texts; set DATA or PLUGBRIDGE_DATA to their directory"
  (cd "$data" && "$python" -m tarfile -c "$text" wordnet/synsets.jsonl \
    pretrain_wordnet/wordnet_glosses_examples.txt pretrain_enwiki_part pretrain_classics_easy \
    pretrain_fairytales/fairytales_train.txt)
  size=$(wc -c <"$text") all=$(($(along) + size))
  echo "$text: $((size / 1000000)) MB; with the checkout and wheels $((all / 1000000)) MB"
  [ "$all" -le "$most" ] || fail "$all bytes are more than the $most that may go along; leave some texts or wheels out"
}

run() {
  case "$1" in
    check) ;; # done once, before the parts
    steps | pack) "$1" ;;
    memory-check) memory "$1" --check "${checked[@]}" ;;
    memory-*) memory "$1" --shapes "${1#memory-}" ;;
    pretrain-small) pretrain small gpt2-20m ;;
    pretrain-large) pretrain large gpt2-120m ;;
    quality) quality "$1" lora ;;
    quality-methods) quality "$1" adapter prefix ;;
  esac
}

# shellcheck disable=SC2086  # names, split on purpose
[ $# -gt 0 ] || set -- $parts
[ "$*" = pack ] || check
failed=0
for part in "$@"; do
  echo "== $part"
  set +e
  (set -e; run "$part")
  status=$?
  set -e
  [ "$failed" != 0 ] || failed=$status
done
exit "$failed"
