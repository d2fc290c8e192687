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

exec torchrun \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
    "$(dirname "$0")/test.py" "$@" --launcher pytorch
