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

exec bash "$(dirname "$0")/torchrun.sh" "$gpus" test.py "$@" --launcher pytorch
