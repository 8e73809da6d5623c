#!/usr/bin/env bash
# Trains with DeepSpeed's launcher: run it on one machine with passwordless ssh to the nodes of the hostfile.
#
#     HOSTFILE=hostfile launch/deepspeed.sh adai-dist train --config configs/recipes/lm_tiny.yaml
#     LAUNCHER=pdsh launch/deepspeed.sh train.py --lr 1
#
# The working directory, the interpreter and the program must have the same paths on all nodes.
set -euo pipefail

# Edit these two, or set them in the environment.
HOSTFILE=${HOSTFILE:-hostfile}     # nodes and their numbers of ranks; see hostfile.example
MASTER_ADDR=${MASTER_ADDR:-}       # address of the first node, reachable from the others; default: its name in HOSTFILE

MASTER_PORT=${MASTER_PORT:-29500}  # free port on that node; a different one for each concurrent job
LAUNCHER=${LAUNCHER:-ssh}          # ssh: a connection per node, all end when one fails; pdsh: DeepSpeed's default
SSH_OPTIONS=${SSH_OPTIONS:-}       # additional ssh options, such as: -p 2222 -F FILE
PYTHON=${PYTHON:-python3}          # interpreter, the same path on every node
# Regular expression of the variables to pass to the nodes; no secrets, since process lists on a node show them.
PASS=${PASS:-'(LD_LIBRARY_)?PATH|CUDA_HOME|HF_HOME|HF_HUB_OFFLINE|(ADAI|DS|GLOO|MKL|NCCL|OMP|PY|TORCH)[A-Z0-9_]*'}

if (($# == 0)); then
    echo "usage: [HOSTFILE=FILE LAUNCHER=ssh|pdsh] ${0##*/} (SCRIPT | -m MODULE | adai-dist) [ARGUMENT ...]" >&2
    exit 2
fi
if [[ $1 == adai-dist ]]; then
    set -- -m adai_dist "${@:2}"
fi
PYTHON=$(command -v "$PYTHON")
[[ $LAUNCHER == @(ssh|pdsh) ]] || { echo "LAUNCHER must be ssh or pdsh; got $LAUNCHER" >&2; exit 2; }

hosts=() world=
while read -r host slots _ || [[ $host ]]; do
    [[ $host && $host != \#* ]] || continue
    if [[ ! $slots =~ ^slots=[1-9][0-9]*$ ]]; then
        echo "$HOSTFILE needs lines: NAME slots=N; got $host${slots:+ $slots}" >&2
        exit 2
    fi
    hosts+=("$host")
    world+="${world:+,}\"$host\":[$(seq -s, 0 $((${slots#slots=} - 1)))]"
done <"$HOSTFILE"
MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}

program=(env)
for name in $(compgen -e); do
    if [[ $name =~ ^($PASS)$ ]]; then
        program+=("$name=${!name}")
    fi
done
program+=("$PYTHON" -u "$@")
options=(--master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --no_python --no_local_rank)

if [[ $LAUNCHER == pdsh ]]; then
    # Each word passes through a shell, DeepSpeed (which quotes words with spaces) and pdsh (which expands %h).
    words=()
    for word in "${program[@]}"; do
        word=$(printf '%q' "$word")
        word=${word//\\ /"$'\\040'"}
        word=${word// /\\040}
        words+=("${word//%/%%}")
    done
    export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $SSH_OPTIONS"
    exec "$PYTHON" -m deepspeed.launcher.runner --hostfile="$HOSTFILE" --no_ssh_check --force_multi \
        "${options[@]}" "${words[@]}"
fi

# shellcheck disable=SC2016 # expanded on the node, not in this script
# On a node, the program ends with its standard input: when this script ends or the connection is lost.
on_node='cd "$1" || exit; shift
"$@" & program=$!
{ read -r _ || kill "$program"; } <&0 >/dev/null 2>&1 & reader=$!
wait "$program" && code=0 || code=$?
kill "$reader"; exit "$code"'
read -ra ssh_options <<<"$SSH_OPTIONS"
exec 3<> <(:) && wait "$!" # a pipe, the standard input on all nodes
trap : INT TERM
world=$(base64 -w0 <<<"{$world}" | tr '+/' '-_')
for node in "${!hosts[@]}"; do
    launch=("$PYTHON" -u -m deepspeed.launcher.launch --world_info="$world" --node_rank="$node" "${options[@]}")
    ssh -o BatchMode=yes -o ServerAliveInterval=10 "${ssh_options[@]}" "${hosts[node]}" \
        "$(printf '%q ' bash -c "$on_node" bash "$PWD" "${launch[@]}" "${program[@]}")" </dev/fd/3 3>&- &
done
code=0
for _ in "${hosts[@]}"; do
    wait -n || { code=$?; break; }
done
exec 3>&-
wait
exit "$code"
