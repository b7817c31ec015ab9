#!/usr/bin/env bash
# One node: CONFIG=run.yaml [NPROC=8] launch/torchrun.sh [--key value ...]
# NPROC processes, by default one per GPU, or one per core without a GPU. It must divide `gpus` of the configuration.
# If one of them dies, all are started again from the last checkpoint, up to MAX_RESTARTS times (default 0).
set -euo pipefail
# A run that is resumed has its configuration in its folder.
[[ " $* " == *" --resume "* ]] || : "${CONFIG:?is not set: the YAML file of the run, e.g. CONFIG=run.yaml}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# --standalone chooses a free port, so that several runs can share a machine. Without --local-addr the processes would
# meet at the machine's own name, which some containers cannot look up.
exec "${PYTHON:-python}" -m syncbn.train.torchrun --standalone --local-addr localhost --nproc-per-node "${NPROC:-auto}" \
  --max-restarts "${MAX_RESTARTS:-0}" \
  -m syncbn train ${CONFIG:+--config "$CONFIG"} "$@"
