#!/usr/bin/env bash
# Trains with DeepSpeed's launcher: run it on one machine, which reaches the nodes of the hostfile by ssh, without a
# password.
#
#     HOSTFILE=hostfile launch/deepspeed.sh adai-dist train --config configs/recipes/lm_tiny.yaml
#     LAUNCHER=pdsh launch/deepspeed.sh train.py --lr 1
#
# The folder, the interpreter and the program have the same paths on all nodes.
set -euo pipefail

# Edit these two, or set them in the environment.
HOSTFILE=${HOSTFILE:-hostfile}     # the nodes, and how many ranks each takes; see hostfile.example
MASTER_ADDR=${MASTER_ADDR:-}       # address of the first node, as the others reach it; default: its name in HOSTFILE

MASTER_PORT=${MASTER_PORT:-29500}  # free on that node; another one for every job at the same time
LAUNCHER=${LAUNCHER:-ssh}          # ssh: one connection per node, all end when one fails; pdsh: DeepSpeed's own way
SSH_OPTIONS=${SSH_OPTIONS:-}       # further options of ssh, such as: -p 2222 -F FILE
PYTHON=${PYTHON:-python3}          # the interpreter on every node
# Variables that the nodes get, a regular expression; no secrets: others see them in the list of processes of a node.
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
    # Words go through a shell, DeepSpeed, which quotes those with spaces, and pdsh, which replaces %h and the like.
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

# shellcheck disable=SC2016 # the node expands these, not this script
# On a node: the program ends when its standard input does, that is when this script ends or the connection is lost.
on_node='cd "$1" || exit; shift
"$@" & program=$!
{ read -r _ || kill "$program"; } <&0 >/dev/null 2>&1 & reader=$!
wait "$program" && code=0 || code=$?
kill "$reader"; exit "$code"'
read -ra ssh_options <<<"$SSH_OPTIONS"
exec 3<> <(:) && wait "$!" # a pipe: the standard input of all nodes
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
