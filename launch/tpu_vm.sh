#!/usr/bin/env bash
# The README's command on every host of a TPU VM pod. Before: the TPU exists, gcloud is
# logged in, and its hosts mount one folder, SHARED, that has a clone of the repository and
# a virtual environment with the package and its extra "tpu" (Python 3.11 or newer):
#   SHARED/puredif_jax  SHARED/venv
# Usage: launch/tpu_vm.sh NAME ZONE SHARED --config=configs/x.py --config.workdir=SHARED/x
set -euo pipefail
# It ends with the session: begin it in tmux or by nohup, and call it again to go on.
usage="usage: launch/tpu_vm.sh NAME ZONE SHARED --config=... (found $# arguments)"
name=${1:?$usage} zone=${2:?$usage} shared=${3:?$usage}
shift 3
: "${1:?no flags for puredif_jax.main: give --config=...}"
place=$(printf %q "$shared")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd $place/puredif_jax && . $place/venv/bin/activate && \
PUREDIF_DISTRIBUTED=1 python -m puredif_jax.main $(printf '%q ' "$@")"
