#!/usr/bin/env bash
# One node: CONFIG=run.yaml [NPROC=8] launch/torchrun.sh [--key value ...]
# NPROC processes, by default one per GPU, or one per core without a GPU. It must divide `gpus` of the configuration.
set -euo pipefail
: "${CONFIG:?is not set: the YAML file of the run, e.g. CONFIG=run.yaml}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# --standalone chooses a free port, so that several runs can share a machine.
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${NPROC:-auto}" \
  -m syncbn train --config "$CONFIG" "$@"
