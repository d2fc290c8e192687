#!/usr/bin/env bash
# Score on several GPUs of one or more nodes: tools/dist_test.sh GPUS [arguments of tools/test.py]
# For several nodes set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each; all see one --work-dir.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi
gpus=$1
shift 1

nodes=(--standalone) # meets at a free port: jobs may share a node
if [ "${NNODES:-1}" -gt 1 ] || [ -n "${MASTER_PORT:-}" ]; then
    nodes=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}"
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${nodes[@]}" --nproc_per_node="$gpus" \
    "$(dirname "$0")/test.py" "$@" --launcher pytorch
