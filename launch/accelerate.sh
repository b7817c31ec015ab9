#!/usr/bin/env bash
# One node through accelerate: CONFIG=run.yaml [NPROC=8] launch/accelerate.sh [--key value ...]
# Precision and the rest come from CONFIG, so accelerate's own settings are fixed here.
set -euo pipefail
: "${CONFIG:?is not set: the YAML file of the run, e.g. CONFIG=run.yaml}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
processes=(--num_processes "${NPROC:-2}")
# accelerate's word for torchrun, which serves CPUs too; refused for a single process.
((${NPROC:-2} < 2)) || processes+=(--multi_gpu)

# Port 0 is one that is free.
exec "${PYTHON:-python}" -m accelerate.commands.launch "${processes[@]}" \
  --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no \
  -m syncbn train --config "$CONFIG" "$@"
