#!/usr/bin/env bash
# The README's command on every host of a TPU VM pod. Before: the TPU exists, gcloud is
# logged in, and the package with the extra "tpu" is installed on its hosts.
# Usage: launch/tpu_vm.sh NAME ZONE --config=configs/x.py --config.workdir=gs://BUCKET/x
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="PUREDIF_DISTRIBUTED=1 python -m puredif_jax.main $(printf '%q ' "$@")"
