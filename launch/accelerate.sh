#!/usr/bin/env bash
# One node through accelerate: CONFIG=run.yaml [NPROC=8] launch/accelerate.sh [--key value ...]
# CONFIG determines the precision and all else, so accelerate's own settings are fixed here.
set -euo pipefail
# A run that is resumed has its configuration in its folder.
[[ " $* " == *" --resume "* ]] || : "${CONFIG:?is not set: the YAML file of the run, e.g. CONFIG=run.yaml}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
processes=(--num_processes "${NPROC:-2}")
# --multi_gpu makes accelerate use torchrun, also on CPUs. It is refused for a single process.
((${NPROC:-2} < 2)) || processes+=(--multi_gpu)

# With port 0 a free port is chosen.
exec "${PYTHON:-python}" -m accelerate.commands.launch "${processes[@]}" \
  --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no \
  -m syncbn train ${CONFIG:+--config "$CONFIG"} "$@"
