#!/bin/sh
# install_frameworks.sh CONSTRAINTS: the frameworks named in FRAMEWORKS ("torch", "tensorflow" or
# "tensorflow,torch") and what Horovod and hvd_dls need, into /opt/venv, in the versions that the
# file pins.
set -eu
constraints=$1
# A file that is not there is none to pip: then its own defaults hold.
export PIP_CONFIG_FILE=/run/machine/pip.conf PIP_DISABLE_PIP_VERSION_CHECK=1

with_dependencies="cffi cloudpickle numba numpy packaging psutil pyyaml setuptools wheel"
alone=
for framework in $(echo "$FRAMEWORKS" | tr , ' '); do
    case $framework in
        torch) with_dependencies="$with_dependencies torch" ;;
        tensorflow)
            # TensorFlow's package without CUDA is for this processor only.
            [ "$(uname -m)" = x86_64 ] && package=tensorflow-cpu || package=tensorflow
            with_dependencies="$with_dependencies $package"
            # It asks for `tensorflow`, whose place tensorflow-cpu takes.
            alone=tf-keras ;;
        *) echo "FRAMEWORKS has '$framework': it is torch, tensorflow or both" >&2; exit 1 ;;
    esac
done
install="/opt/venv/bin/python -m pip install --progress-bar off --constraint $constraints"
$install $with_dependencies
[ -z "$alone" ] || $install --no-deps $alone
