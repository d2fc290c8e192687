#!/usr/bin/env bash
# Train in one process per GPU: tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Such an option is --strategy fsdp2 (or zero2, zero3); without it, every GPU holds the whole model.
# For several nodes run it on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2

exec bash "$(dirname "$0")/torchrun.sh" "$gpus" train.py "$config" --launcher pytorch "$@"
