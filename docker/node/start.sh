#!/bin/sh
# One host of a cluster: sshd, as an ordinary user, on port 2222. The keys are in /cluster, a volume
# that all nodes share; the first one to come makes them. They exist nowhere else.
set -eu
cd "${HVD_DLS_CLUSTER_KEYS:-/cluster}"
if mkdir making 2>/dev/null; then  # of several nodes that start at once, one gets here
    umask 077
    ssh-keygen -q -t ed25519 -N '' -C 'host of this cluster' -f host_key
    ssh-keygen -q -t ed25519 -N '' -C 'user of this cluster' -f user_key
    echo "* $(cut -d ' ' -f 1,2 host_key.pub)" > known_hosts
    cp user_key.pub authorized_keys
    touch ready
fi
waited=0
until [ -e ready ]; do
    [ $waited -lt 30 ] || { echo "no keys in $PWD after 30 s: remove this volume" >&2; exit 1; }
    sleep 1
    waited=$((waited + 1))
done
exec /usr/sbin/sshd -D -e -f /etc/hvd_dls_node/sshd_config
