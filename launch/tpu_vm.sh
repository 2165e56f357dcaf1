#!/usr/bin/env bash
# The README's command on every host of a TPU VM pod. Before: the TPU exists, gcloud is
# logged in, and its hosts have the package with the extra "tpu" and mount one folder.
# Usage: launch/tpu_vm.sh NAME ZONE --config=configs/x.py --config.workdir=/mnt/SHARED/x
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="PUREDIF_DISTRIBUTED=1 python -m puredif_jax.main $(printf '%q ' "$@")"
