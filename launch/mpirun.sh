#!/usr/bin/env bash
# Trains with Open MPI: run it on one machine with passwordless ssh to the nodes of the hostfile.
#
#     HOSTFILE=hostfile launch/mpirun.sh adai-dist train --config configs/recipes/lm_tiny.yaml
#     HOSTFILE=hostfile launch/mpirun.sh train.py --lr 1
#
# The working directory, the interpreter, Open MPI and the program must have the same paths on all nodes.
set -euo pipefail

# Edit these two, or set them in the environment.
HOSTFILE=${HOSTFILE:-hostfile}     # nodes and their numbers of ranks; see hostfile.example
MASTER_ADDR=${MASTER_ADDR:-}       # address of the first node, reachable from the others; default: its name in HOSTFILE

MASTER_PORT=${MASTER_PORT:-29500}  # free port on that node; a different one for each concurrent job
TORCH_ENV=${TORCH_ENV:-1}          # 1: set RANK, WORLD_SIZE and LOCAL_RANK; 0: DeepSpeed queries MPI (mpi4py)
PYTHON=${PYTHON:-python3}          # interpreter, the same path on every node
# Regular expression of the variables to pass to the nodes.
PASS=${PASS:-'(LD_LIBRARY_)?PATH|CUDA_HOME|(ADAI|DS|GLOO|HF|MASTER|MKL|NCCL|OMP|PY|TORCH)[A-Z0-9_]*'}

if (($# == 0)); then
    echo "usage: [HOSTFILE=FILE] ${0##*/} (SCRIPT | -m MODULE | adai-dist) [ARGUMENT ...]" >&2
    exit 2
fi
if [[ $1 == adai-dist ]]; then
    set -- -m adai_dist "${@:2}"
fi
if [[ -z $MASTER_ADDR ]]; then
    MASTER_ADDR=$(awk '!/^ *(#|$)/ { print $1; exit }' "$HOSTFILE")
fi
export MASTER_ADDR MASTER_PORT

passed=()
for name in $(compgen -e); do
    if [[ $name =~ ^($PASS)$ ]]; then
        passed+=(-x "$name")
    fi
done
program=("$(command -v "$PYTHON")" -u "$@")
if [[ $TORCH_ENV == 1 ]]; then
    # shellcheck disable=SC2016 # expanded on the rank, not in this script
    set_env='export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE
        export LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK; exec "$@"'
    program=(bash -c "$set_env" bash "${program[@]}")
fi
# One rank per slot, not bound to cores.
exec mpirun --hostfile "$HOSTFILE" --map-by slot --bind-to none "${passed[@]}" "${program[@]}"
