#!/usr/bin/env bash
# Run a tool in one process per GPU, for dist_train.sh and dist_test.sh: tools/torchrun.sh GPUS TOOL [its options]
set -euo pipefail

gpus=$1
tool=$2
shift 2

nodes=(--standalone) # meets at a free port: jobs may share a node
if [ "${NNODES:-1}" -gt 1 ] || [ -n "${MASTER_PORT:-}" ]; then
    nodes=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}"
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${nodes[@]}" --nproc_per_node="$gpus" \
    "$(dirname "$0")/$tool" "$@"
