#!/usr/bin/env bash
# What to measure when a GPU is at hand for half an hour, the most important first. Each part writes before the next begins.
#
#   bash benchmarks/gpu_day.sh PART ROOT OUT          PART: tests, mtt, costs or all; ROOT: folder of the CIFAR-10 files
#
# tests (4 min): every CUDA test. mtt (10 min): MTT on CIFAR-10, 1 image per class, 20 experts, 1,000 steps, base and
# DynaDistill. costs (8 min): step, experts, evaluation and IDC, in float32, TF32 and bfloat16 where a program has them.
# For other days: more seeds, 5,000 steps, 100 experts, time_to_accuracy.py.
# MINIATURE=1 DEVICE=cpu runs all of it on digits, to see that it runs.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?"PART: tests, mtt, costs or all"} root=${2:?"ROOT: folder of the CIFAR-10 files"} out=${3:?"OUT: folder of the results"}
device=${DEVICE:-cuda} python=${PYTHON:-python3} mini=${MINIATURE:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
if [ -n "$mini" ]; then export TORCHDYNAMO_DISABLE=1; fi  # compiling takes minutes; the class statistics need it
failed=0

run() { # NAME COMMAND...: run it, with its output and its time in OUT
  local name=$1 started=$SECONDS status
  shift
  "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$name: exit $status, $((SECONDS - started)) s" | tee -a "$out/parts.txt"
  [ "$status" = 0 ] || failed=1
}

header() {
  git describe --always --dirty 2>/dev/null
  "$python" -c "import torch; print('torch', torch.__version__, *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))"
}

tests() { run tests "$python" -m pytest -q -p no:cacheprovider -m gpu ${mini:+--collect-only}; }

mtt() {
  local accelerator=gpu configs=(--config configs/mtt/cifar10_ipc1.yaml --data.init_args.root "$root"
    --model.pool.init_args.num_experts 20 --trainer.max_steps 1000 --evaluation.num_networks 5
    --evaluation.num_networks_intermediate 2)
  if [ "$device" = cpu ]; then accelerator=cpu; fi
  if [ -n "$mini" ]; then
    configs=(--config configs/quickstart.yaml --config configs/smoke.yaml --config configs/smoke_trajectories.yaml
      --selection null)
  fi
  configs+=(--runs "$out/runs" --model.pool.init_args.path "$out/experts" --trainer.accelerator "$accelerator"
    --trainer.enable_progress_bar false)
  run mtt_base "$python" -m dd_lightning fit "${configs[@]}" --name base
  run mtt_dynadistill "$python" -m dd_lightning fit "${configs[@]}" --config configs/dynadistill.yaml \
    ${mini:+--selection.pool_size 3} --name dynadistill
}

costs() {
  local size=()
  if [ -n "$mini" ]; then size=(--network ConvNet-1-W4 --size 8 --channels 1); fi
  run step_cost "$python" benchmarks/step_cost.py --device "$device" --out "$out/step_cost.json" \
    "${size[@]}" ${mini:+--steps 2 --repeats 1 --rounds 1}
  run expert_throughput "$python" benchmarks/expert_throughput.py --device "$device" --out "$out/expert_throughput.json" \
    "${size[@]}" ${mini:+--steps 1 --rounds 1 --batch 16}
  run evaluation_cost "$python" benchmarks/evaluation_cost.py --device "$device" --out "$out/evaluation_cost.json" \
    ${mini:+--cases "ConvNet-2-W32, 10 of 8x8" --networks 1 --rounds 1 --threads 1}
  run inner_step_cost env -u TORCHDYNAMO_DISABLE "$python" benchmarks/inner_step_cost.py --device "$device" --out "$out/inner_step_cost.json" \
    ${mini:+--widths 4 --network ConvNet-1 --size 8 --classes 2 --ipc 1 --batch_real 4 --training_images 8 --rounds 1 --seconds 1}
}

header | tee "$out/machine.txt"
case $part in
  tests | mtt | costs) "$part" ;;
  all) tests; mtt; costs ;;
  *) echo "gpu_day.sh: PART is '$part'; use tests, mtt, costs or all" >&2; exit 2 ;;
esac
exit $failed
