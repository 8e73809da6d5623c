#!/usr/bin/env bash
# Trains with accelerate: run the same command on every node, with its own NODE_RANK.
#
#     launch/accelerate.sh train.py --lr 1                                          one node
#     NUM_NODES=2 MASTER_ADDR=node1 NODE_RANK=0 launch/accelerate.sh train.py       the first of two
#     CONFIG=configs/accelerate/fsdp2.yaml launch/accelerate.sh train.py            another configuration
#
# These settings override num_machines, num_processes, machine_rank and related keys of the configuration.
set -euo pipefail

# Edit these two, or set them in the environment.
NUM_NODES=${NUM_NODES:-1}          # number of nodes
MASTER_ADDR=${MASTER_ADDR:-}       # name or address of the first node (NODE_RANK=0), reachable from the others

NODE_RANK=${NODE_RANK:-0}          # index of this node, from 0
MASTER_PORT=${MASTER_PORT:-29500}  # free port on the first node; a different one for each concurrent job
RANKS_PER_NODE=${RANKS_PER_NODE:-} # processes per node; default: the number of GPUs, else 1
CONFIG=${CONFIG:-configs/accelerate/ddp.yaml} # see configs/README.md
PYTHON=${PYTHON:-python3}          # the interpreter on every node

if (($# == 0)); then
    knobs="[NUM_NODES=N MASTER_ADDR=HOST NODE_RANK=I]"
    echo "usage: $knobs ${0##*/} (SCRIPT | -m MODULE | adai-dist) [ARGUMENT ...]" >&2
    exit 2
fi
if [[ $1 == adai-dist ]]; then
    set -- -m adai_dist "${@:2}"
fi
if [[ -z $RANKS_PER_NODE ]]; then
    RANKS_PER_NODE=$("$PYTHON" -c "import torch; print(torch.cuda.device_count() or 1)")
fi

nodes=(--num_machines="$NUM_NODES" --num_processes="$((NUM_NODES * RANKS_PER_NODE))" --machine_rank="$NODE_RANK")
nodes+=(--main_process_port="$MASTER_PORT")
if ((NUM_NODES > 1)); then
    : "${MASTER_ADDR:?must be the name or address of the first node}"
    # With its default launcher, accelerate would start DeepSpeed through pdsh from every node.
    nodes+=(--main_process_ip="$MASTER_ADDR" --same_network --rdzv_backend=static)
    nodes+=(--deepspeed_multinode_launcher=standard)
fi
exec "$PYTHON" -m accelerate.commands.launch --config_file="$CONFIG" "${nodes[@]}" "$@"
