#!/usr/bin/env bash
# Runs rlt_jax on a list of hosts over ssh, one process per host.
#
#   launch/hosts.sh --hosts=HOST,HOST,... --config=FILE --workdir=DIR \
#       [flags] [-- flags of rlt_jax.main]
#   launch/hosts.sh --hosts=ann@10.0.0.1,ann@10.0.0.2 --config=configs/rlt.py:gsm8k \
#       --workdir=/shared/gsm8k -- --config.seed=1
#
# Installs rlt_jax on every host, runs it on all hosts with the first as coordinator,
# prints their output, each line prefixed with the index of the host, and copies the
# workdir from the first host. If a connection is lost (ssh status 255), the run is
# restarted on the same hosts and resumes from its workdir. If a process fails, the others
# are terminated, and the exit status is that of the first that failed. The hosts must
# accept ssh without a password prompt, and the coordinator's port must be reachable from
# all of them. The workdir must be on shared storage, or a gs:// path, which every host
# mounts with gcsfuse.
#
# Every flag can also be set by an environment variable: RLT_ and its name in capitals;
# repeatable flags have one value per line there.
#
#   --hosts=HOSTS        comma-separated hosts, in the format of ssh
#   --config=FILE        config of the run: in the checkout, or a path on the hosts
#   --workdir=DIR        workdir of the run: gs://BUCKET/PATH, or a shared folder
#   --coordinator_address=ADDRESS:PORT
#                        address of process 0 for the other hosts; by default the first
#                        of --hosts, without its user, at port 8476
#   --install=checkout   checkout: the last commit of this checkout; none: keep an earlier
#                        installation; otherwise a requirement for pip
#   --extra=cuda         extra to install with the checkout: cuda or tpu
#   --python=3.12        Python of the virtual environment, downloaded if missing
#   --remote_dir=rlt_jax_launch
#                        folder on each host for the installation, relative to the home
#   --setup=COMMAND      shell command that each host runs before the installation
#   --env=NAME=VALUE     environment variable of the run; repeatable
#   --ssh_flag=FLAG      flag of ssh and scp, such as -i, one word; repeatable
#   --fetch_to=runs      local folder to copy the workdir to; none: do not copy it
#   --attempts=3         maximum number of times that the run is started
#   --pause_seconds=30   pause before the run is restarted
#   --grace_seconds=10   time for connections to end before they are killed
#   --dry_run            print the commands without running them

# shellcheck disable=SC2329  # functions are called through on_all_hosts
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"
. "$here/checks.sh"
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
if [[ ${flag[install]} == checkout ]]; then
  require_committed_config
else
  unchecked_config "on the hosts"
fi

IFS=, read -ra hosts <<<"${flag[hosts]}"
for host in "${hosts[@]}"; do
  [[ -n $host && $host != -* ]] || die "--hosts=${flag[hosts]} has an invalid host: '$host'"
done
coordinator=${flag[coordinator_address]:-${hosts[0]#*@}:8476}
mapfile -t ssh_flags < <(values ssh_flag)
# Detects a dead host within a minute.
ssh_flags+=(-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
scratch=""
trap '[[ -z $scratch ]] || rm -rf "$scratch"' EXIT

copy_to_host() { become scp "${ssh_flags[@]}" "$archive" "${hosts[$1]}:rlt_jax.tar.gz"; }

install_on_host() {
  become ssh "${ssh_flags[@]}" "${hosts[$1]}" "$(install_command "${flag[extra]}")"
}

# With a remote terminal, closing the connection ends the process.
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
  say "a connection was lost; starting attempt $((attempt + 1)) of ${flag[attempts]}"
  sleep "${flag[pause_seconds]}"
done
if ((status)); then
  say "the run failed with status $status"
elif fetches; then
  dry_run || mkdir -p "${flag[fetch_to]}"
  run scp -r "${ssh_flags[@]}" "${hosts[0]}:$(remote_workdir)" "${flag[fetch_to]}"
fi
exit "$status"
