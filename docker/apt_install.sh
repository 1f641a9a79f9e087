#!/bin/sh
# apt_install PACKAGE...: installs them and leaves no lists and no archives behind. Where the build
# was given the machine's own settings (see the stage `machine` in the Dockerfile), it uses them.
set -eu
[ ! -e /run/machine/apt.conf ] || export APT_CONFIG=/run/machine/apt.conf
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet=2
apt-get install --quiet=2 --yes --no-install-recommends -o Dpkg::Use-Pty=0 "$@"
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
