#!/usr/bin/env bash
# Runs rlt_jax in several processes on this machine, to test and debug multi-host runs.
# The processes have CPU devices and communicate over loopback with gloo.
#
#   launch/local_pod.sh N --config=FILE --workdir=DIR [flags] [-- flags of rlt_jax.main]
#   launch/local_pod.sh 2 --config=configs/quickstart.py --workdir=runs/pod -- --config.seed=1
#
# Each line of output is prefixed with the id of its process. If a process fails, the
# others are terminated; the exit status is that of the first that failed.
#
# Every flag can also be set by an environment variable: RLT_ and its name in capitals.
#
#   --processes=N        number of processes; can be given as N before the flags
#   --config=FILE        config of the run
#   --workdir=DIR        workdir of the run
#   --devices=4          CPU devices of each process
#   --port=PORT          port of process 0 on loopback; a free one by default
#   --python=python      Python with rlt_jax installed
#   --grace_seconds=30   time for processes to end before they are killed
#   --dry_run            print the commands without running them
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"
. "$here/checks.sh"
. "$here/processes.sh"

declare -A flag=(
  [processes]="" [config]="" [workdir]="" [devices]=4 [port]="" [python]=python
  [grace_seconds]=30 [dry_run]=false
)
[[ ${1-} != [0-9]* ]] || set -- "--processes=$1" "${@:2}"
parse_flags "$@"
require processes config workdir
require_number processes devices grace_seconds
require_config_here

free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000)) # below the range of ephemeral ports
    (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  printf '%s' "$port"
}

process() { # process ID
  local command=(
    env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${flag[devices]}"
    JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo PYTHONUNBUFFERED=1
    "XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false ${XLA_FLAGS:-}"
    "${flag[python]}" -m rlt_jax.main "--config=${flag[config]}"
    "--workdir=${flag[workdir]}" "--coordinator_address=127.0.0.1:${flag[port]}"
    "--num_processes=${flag[processes]}" "--process_id=$1" "${main_args[@]}"
  )
  become "${command[@]}"
}

[[ -n ${flag[port]} ]] || flag[port]=$(free_port)
if dry_run; then
  for ((id = 0; id < flag[processes]; id++)); do process "$id"; done
else
  together "${flag[processes]}" process
fi
