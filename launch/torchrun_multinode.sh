#!/usr/bin/env bash
# Several nodes, the same command on each: CONFIG=run.yaml NNODES=2 RDZV_ENDPOINT=node0:29500 launch/torchrun_multinode.sh
# NPROC processes per node, by default one per GPU. RDZV_ENDPOINT is a free port on one of the nodes. The ranks are
# assigned there, so no node needs a number. RDZV_ID distinguishes jobs that share an endpoint. If a process dies, all are
# started again from the last checkpoint, up to MAX_RESTARTS times (default 0).
set -euo pipefail
# A run that is resumed has its configuration in its folder.
[[ " $* " == *" --resume "* ]] || : "${CONFIG:?is not set: the YAML file of the run, e.g. CONFIG=run.yaml}"
: "${NNODES:?is not set: the number of nodes, e.g. NNODES=2}"
: "${RDZV_ENDPOINT:?is not set: where the nodes meet, host:port of one of them, e.g. RDZV_ENDPOINT=node0:29500}"
[[ $RDZV_ENDPOINT =~ :[0-9]+$ ]] || { echo "RDZV_ENDPOINT: got '$RDZV_ENDPOINT', expected host:port" >&2; exit 1; }
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "${PYTHON:-python}" -m syncbn.train.torchrun --nnodes "$NNODES" --nproc-per-node "${NPROC:-auto}" \
  --max-restarts "${MAX_RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-syncbn}" \
  -m syncbn train ${CONFIG:+--config "$CONFIG"} "$@"
