#!/usr/bin/env bash
# Trains with torchrun: run the same command on every node, within a minute.
#
#     launch/torchrun.sh adai-dist train --config configs/recipes/lm_tiny.yaml     one node
#     NUM_NODES=2 MASTER_ADDR=node1 launch/torchrun.sh train.py --lr 1             two nodes
set -euo pipefail

# Edit these two, or set them in the environment.
NUM_NODES=${NUM_NODES:-1}          # number of nodes
MASTER_ADDR=${MASTER_ADDR:-}       # name or address of the node that hosts the rendezvous

MASTER_PORT=${MASTER_PORT:-29500}  # free port on that node; a different one for each concurrent job
RANKS_PER_NODE=${RANKS_PER_NODE:-} # processes per node; default: the number of GPUs, else 1
NODE_RANK=${NODE_RANK:-}           # if nodes cannot recognise MASTER_ADDR as their own: 0 on that node, else 1, 2, ...
MAX_RESTARTS=${MAX_RESTARTS:-0}    # number of restarts of all ranks after a failure
RUN_ID=${RUN_ID:-adai_dist}        # the same on all nodes of a job
JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}  # seconds to wait for the other nodes
PYTHON=${PYTHON:-python3}          # interpreter, the same path on every node

if (($# == 0)); then
    echo "usage: [NUM_NODES=N MASTER_ADDR=HOST] ${0##*/} (SCRIPT | -m MODULE | adai-dist) [ARGUMENT ...]" >&2
    exit 2
fi
if [[ $1 == adai-dist ]]; then
    set -- -m adai_dist "${@:2}"
fi
if [[ -z $RANKS_PER_NODE ]]; then
    RANKS_PER_NODE=$("$PYTHON" -c "import torch; print(torch.cuda.device_count() or 1)")
fi

if [[ $NUM_NODES == 1 ]]; then
    meeting=(--standalone)
else
    : "${MASTER_ADDR:?must be the name or address of one of the nodes, the same on all of them}"
    meeting=(--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$RUN_ID"
        --rdzv-conf="join_timeout=$JOIN_TIMEOUT${NODE_RANK:+,is_host=$((NODE_RANK == 0))}")
fi
# By default, torch 2.13 shares one store across restarts, in which ranks may find addresses from before the restart.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$PYTHON" -m torch.distributed.run --nnodes="$NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" \
    --max-restarts="$MAX_RESTARTS" "${meeting[@]}" "$@"
