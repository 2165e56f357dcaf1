#!/usr/bin/env bash
# Several processes on this machine, each with its own CPU devices; the README's command
# otherwise. Usage: launch/local_processes.sh PROCESSES --config=configs/x.py [...]
set -euo pipefail
count=$1
shift
export JAX_PLATFORMS=cpu PUREDIF_COORDINATOR=127.0.0.1:${PORT:-12355}
export PUREDIF_NUM_PROCESSES=$count
trap 'kill 0' INT TERM
for ((i = 0; i < count; i++)); do
  PUREDIF_PROCESS_ID=$i python -m puredif_jax.main "$@" &
done
status=0  # the largest of all; a scan that has found a backdoor ends with 3
for ((i = 0; i < count; i++)); do
  found=0
  wait -n || found=$?
  ((found > status)) && status=$found
done
exit $status
