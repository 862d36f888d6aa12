#!/usr/bin/env bash
# Runs rlt_jax on a list of hosts reached by ssh, one process a host.
#
#   launch/hosts.sh --hosts=HOST,HOST,... --config=FILE --workdir=DIR \
#       [flags] [-- flags of rlt_jax.main]
#   launch/hosts.sh --hosts=ann@10.0.0.1,ann@10.0.0.2 --config=configs/gsm8k.py \
#       --workdir=/shared/gsm8k -- --config.seed=1
#
# Installs rlt_jax on every host, runs it on all of them with the first as coordinator,
# shows what they print, each line prefixed with the index of its host, and fetches the
# workdir of the first host. When a connection is lost (status 255 of ssh) the run is
# started again on the same hosts and goes on from its workdir. When a process fails the
# others are hung up, and the exit status is that of the first that failed. The hosts must
# accept ssh without a password prompt and reach each other at the coordinator's port; the
# workdir must be one that all of them see: shared storage, or a gs:// path, which every
# host mounts with gcsfuse.
#
# Every flag can also be given as an environment variable: RLT_ and its name in capitals;
# flags that may be repeated have a line for each value there.
#
#   --hosts=HOSTS        comma-separated, each as ssh takes it
#   --config=FILE        config of the run: in the checkout, or a path on the hosts
#   --workdir=DIR        workdir of the run: gs://BUCKET/PATH, or a folder that all see
#   --coordinator_address=ADDRESS:PORT
#                        where process 0 is reached by the others; by default the first
#                        of --hosts, without its user, at port 8476
#   --install=checkout   checkout: the last commit of this checkout; none: what an earlier
#                        launch installed; else what pip is to install
#   --extra=cuda         extra that comes with the checkout: cuda or tpu
#   --python=3.12        Python of the virtual environment, fetched if it is not there
#   --remote_dir=rlt_jax_launch
#                        folder on each host, relative to the home, for all of this
#   --setup=COMMAND      shell command that each host runs before the installation
#   --env=NAME=VALUE     environment variable of the run; may be repeated
#   --ssh_flag=FLAG      flag of ssh and scp, such as -i; may be repeated, a word each
#   --fetch_to=runs      local folder that receives the workdir; none: not fetched
#   --attempts=3         how often the run is started at most
#   --pause_seconds=30   pause before the run is started again
#   --grace_seconds=10   time that connections have to end before they are killed
#   --dry_run            print the commands, run nothing

# shellcheck disable=SC2329  # functions are called through on_all_hosts
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"
. "$here/processes.sh"
. "$here/workers.sh"

declare -A flag=(
  [hosts]="" [config]="" [workdir]="" [coordinator_address]="" [install]=checkout
  [extra]=cuda [python]=3.12 [remote_dir]=rlt_jax_launch [setup]="" [env]=""
  [ssh_flag]="" [fetch_to]=runs [attempts]=3 [pause_seconds]=30 [grace_seconds]=10
  [dry_run]=false
)
# shellcheck disable=SC2034  # read by parse_flags
repeatable=(env ssh_flag)
parse_flags "$@"
require hosts config workdir
require_number attempts grace_seconds

IFS=, read -ra hosts <<<"${flag[hosts]}"
for host in "${hosts[@]}"; do
  [[ -n $host && $host != -* ]] || die "--hosts=${flag[hosts]} has a host that is none: '$host'"
done
coordinator=${flag[coordinator_address]:-${hosts[0]#*@}:8476}
mapfile -t ssh_flags < <(values ssh_flag)
# A host that is switched off shows within a minute.
ssh_flags+=(-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
scratch=""
trap '[[ -z $scratch ]] || rm -rf "$scratch"' EXIT

copy_to_host() { become scp "${ssh_flags[@]}" "$archive" "${hosts[$1]}:rlt_jax.tar.gz"; }

install_on_host() {
  become ssh "${ssh_flags[@]}" "${hosts[$1]}" "$(install_command "${flag[extra]}")"
}

# With a terminal on the other side, hanging up ends the process there.
run_on_host() {
  become ssh -tt "${ssh_flags[@]}" "${hosts[$1]}" "$(run_command \
    "--coordinator_address=$coordinator" "--num_processes=${#hosts[@]}" "--process_id=$1")"
}

on_all_hosts() { # on_all_hosts FUNCTION
  if dry_run; then
    local id
    for id in "${!hosts[@]}"; do "$1" "$id"; done
  else
    together "${#hosts[@]}" "$1"
  fi
}

if [[ ${flag[install]} == checkout ]]; then
  archive=rlt_jax.tar.gz
  dry_run || scratch=$(mktemp -d) archive=$scratch/rlt_jax.tar.gz
  pack_checkout "$archive"
  on_all_hosts copy_to_host
fi
[[ -z $(install_command "${flag[extra]}") ]] || on_all_hosts install_on_host

for ((attempt = 1; ; attempt++)); do
  status=0
  on_all_hosts run_on_host || status=$?
  ((status == 255 && attempt < flag[attempts])) || break
  say "a connection was lost; attempt $((attempt + 1)) of ${flag[attempts]} follows"
  sleep "${flag[pause_seconds]}"
done
if ((status)); then
  say "the run failed with status $status"
elif fetches; then
  dry_run || mkdir -p "${flag[fetch_to]}"
  run scp -r "${ssh_flags[@]}" "${hosts[0]}:$(remote_workdir)" "${flag[fetch_to]}"
fi
exit "$status"
