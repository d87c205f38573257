#!/bin/bash
# A Slurm cluster on one host, every node in namespaces of its own: hostname, address, processes.
#
#   unshare --net --pid --mount --uts --ipc --fork --kill-child --mount-proc -- slurm_cluster.sh DIR NODES
#
# DIR/etc/slurm.conf is there already. Commands come through the pipe DIR/run/commands, a line each:
# "off N" kills all that runs on a node at once, "on N" boots it, "cut N" pulls its cable, "mend N".
# Killing the unshare process ends everything.
set -euo pipefail
dir=$1 nodes=$2

hostname controller
ip link set lo up
mount --bind "$dir/etc/hosts" /etc/hosts
ip link add bridge type bridge
ip address add 10.77.0.254/24 dev bridge
ip link set bridge up

export SLURM_CONF=$dir/etc/slurm.conf
munged --foreground --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.socket" \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
    --seed-file="$dir/run/munged.seed" &
until [[ -S $dir/run/munge.socket ]]; do sleep 0.02; done
slurmctld -D >"$dir/log/slurmctld.out" 2>&1 &
until (: </dev/tcp/10.77.0.254/6817) 2>/dev/null; do sleep 0.02; done

boot() {
    local node=$1 outer inner
    # shellcheck disable=SC2016 # expanded by the inner shell
    unshare --net --pid --mount --uts --ipc --fork --kill-child --mount-proc -- bash -c '
        hostname "node$1"
        ip link set lo up
        until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
        ip address add "10.77.0.$1/24" dev eth0
        ip link set eth0 up
        exec slurmd -D -N "node$1"' boot "$node" >>"$dir/log/node$node.out" 2>&1 &
    outer=$!
    until inner=$(cat "/proc/$outer/task/$outer/children") && [[ -n $inner ]] &&
        [[ $(readlink "/proc/${inner%% *}/ns/net") != "$(readlink /proc/$$/ns/net)" ]]; do
        sleep 0.02
    done
    ip link add "cable$node" type veth peer name eth0 netns "${inner%% *}"
    ip link set "cable$node" master bridge up
    echo "$outer" >"$dir/run/node$node"
}

mkfifo "$dir/run/commands"
for node in $(seq "$nodes"); do boot "$node"; done
touch "$dir/run/ready"
exec 3<>"$dir/run/commands"
while read -r command node <&3; do
    case $command in
    on) boot "$node" ;;
    off) kill -9 "$(cat "$dir/run/node$node")" ;;
    cut) ip link set "cable$node" down ;;
    mend) ip link set "cable$node" up ;;
    esac
done
