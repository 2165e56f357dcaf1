#!/usr/bin/env bash
# Several processes on this machine, each with its own CPU devices; the README's command
# otherwise. Usage: launch/local_processes.sh PROCESSES --config=configs/x.py [...]
set -uo pipefail
count=${1:-}
if ! [[ $count =~ ^[1-9][0-9]*$ ]]; then
  echo "error: the first argument is the number of processes, found '$count'" >&2
  exit 1
fi
shift
export JAX_PLATFORMS=cpu PUREDIF_COORDINATOR=127.0.0.1:${PORT:-12355}
export PUREDIF_NUM_PROCESSES=$count
started=()
trap 'kill -TERM "${started[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < count; i++)); do
  PUREDIF_PROCESS_ID=$i python -m puredif_jax.main "$@" &
  started+=($!)
done
status=0  # the largest of all; a scan that has found a backdoor ends with 3
for process in "${started[@]}"; do
  while :; do
    wait "$process"
    found=$?
    ((found > 128)) || break
    kill -0 "$process" 2>/dev/null && continue  # a signal has ended "wait" alone
    wait "$process"
    again=$?
    ((again == 127)) || found=$again  # its own, where the signal came just before
    break
  done
  ((found > status)) && status=$found
done
exit $status
