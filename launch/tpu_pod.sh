#!/usr/bin/env bash
# Runs rlt_jax on all workers of a Cloud TPU slice (v4 to v6e), or of several slices.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --accelerator_type=TYPE --config=FILE \
#       --workdir=DIR [flags] [-- flags of rlt_jax.main]
#   launch/tpu_pod.sh --name=rlt --zone=us-east5-b --accelerator_type=v6e-64 --queued \
#       --spot --config=configs/rlt.py:gsm8k --workdir=gs://bucket/gsm8k -- --config.seed=1
#
# Uses the slice with the given name or creates it, installs rlt_jax on its workers, runs
# the config on all workers and prints their output, copies the workdir from worker 0
# unless it is in a bucket, and deletes the slice if this launcher created it. A slice that
# existed before is never deleted. If the slice is preempted, it is created again and the
# run resumes from its workdir, which must be on storage that outlives the slice: a gs://
# path, which every worker mounts with gcsfuse, or a folder that --setup mounts. With
# several workers, it must be on shared storage. The exit status is that of the run, and
# 2 if something was refused before the run.
#
# With --max_hours, the workers send the run SIGTERM when it has had its slices for that
# many hours. The run saves a checkpoint, its exit status 143 is returned, slices that this
# launcher created are deleted, and the same command continues the run. Time before the
# slices are ready is not counted. If this launcher is killed or loses its connection, the
# run ends in time as well, but nobody deletes the slices.
#
# Every flag can also be set by an environment variable: RLT_ and its name in capitals;
# repeatable flags have one value per line there.
#
#   --name=NAME          name of the slice, and of its queued resource
#   --zone=ZONE          zone of the slice
#   --project=PROJECT    project of the slice; by default the current gcloud project
#   --accelerator_type=TYPE
#                        type of the slice to create: v5litepod-16, v6e-64, ...
#   --node_count=1       number of slices; several are a queued resource, and are named
#                        NAME-0, NAME-1, ...
#   --version=IMAGE      runtime image of the VMs; by default the one for the TPU version
#   --queued             create a queued resource and wait for it
#   --spot               use spot capacity, which can be preempted
#   --create_flag=FLAG   flag of gcloud's create, such as --network=NAME; repeatable
#   --config=FILE        config of the run: in the checkout, or a path on the workers
#   --workdir=DIR        workdir of the run: gs://BUCKET/PATH, or a folder
#   --install=checkout   checkout: the last commit of this checkout; none: keep an earlier
#                        installation; otherwise a requirement for pip
#   --python=3.12        Python of the virtual environment, downloaded if missing
#   --remote_dir=rlt_jax_launch
#                        folder on each worker for the installation, relative to the home
#   --setup=COMMAND      shell command that each worker runs before the installation
#   --env=NAME=VALUE     environment variable of the run; repeatable
#   --ssh_flag=FLAG      flag of gcloud's ssh and scp, such as --internal-ip; repeatable
#   --fetch_to=runs      local folder to copy the workdir to; none: do not copy it
#   --keep               do not delete the slice, even if this launcher created it
#   --max_hours=HOURS    end the run after that time, such as 12 or 0.5
#   --grace_seconds=600  time for the run to save after --max_hours before it is killed
#   --attempts=10        maximum number of times that the slice is created and the run started
#   --poll_seconds=30    interval for polling the state of the slice
#   --dry_run            print the commands for a new slice without running them
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"
. "$here/checks.sh"
. "$here/workers.sh"

declare -A flag=(
  [name]="" [zone]="" [project]="" [accelerator_type]="" [node_count]=1 [version]=""
  [queued]=false [spot]=false [create_flag]="" [config]="" [workdir]="" [install]=checkout
  [python]=3.12 [remote_dir]=rlt_jax_launch [setup]="" [env]="" [ssh_flag]=""
  [fetch_to]=runs [keep]=false [max_hours]="" [grace_seconds]=600 [attempts]=10
  [poll_seconds]=30 [dry_run]=false
)
# shellcheck disable=SC2034  # read by parse_flags
repeatable=(create_flag env ssh_flag)
parse_flags "$@"
require name zone config workdir
require_number attempts node_count grace_seconds
max_seconds="" # --max_hours in seconds
if [[ -n ${flag[max_hours]} ]]; then
  [[ ${flag[max_hours]} =~ ^[0-9]{1,5}(\.[0-9]+)?$ ]] &&
    max_seconds=$(calculate "int(${flag[max_hours]} * 3600)")
  ((max_seconds > 0)) ||
    die "--max_hours must be a positive number of hours, not '${flag[max_hours]}'"
  [[ ${flag[keep]} == false ]] ||
    die "--max_hours limits the cost and --keep does not; set only one of them"
fi
refuse_local_config
if [[ ${flag[install]} == checkout ]]; then
  require_committed_config
else
  unchecked_config "on the workers"
fi

name=${flag[name]}
place=("--zone=${flag[zone]}")
[[ -z ${flag[project]} ]] || place+=("--project=${flag[project]}")
mapfile -t create_flags < <(values create_flag)
mapfile -t ssh_flags < <(values ssh_flag)
tpus=(gcloud compute tpus)

# Several slices are the nodes of one queued resource. Cloud TPU writes MEGASCALE_... to
# the metadata of its VMs, where JAX reads them, so the workers need no flags to connect.
# https://docs.cloud.google.com/tpu/docs/multislice-introduction
# https://github.com/jax-ml/jax/blob/main/jax/_src/clusters/cloud_tpu_cluster.py
if ((flag[node_count] == 1)); then
  nodes=("$name") resource=tpu-vm
  node_flags=("--node-id=$name")
  everywhere=(--worker=all) first=(--worker=0)
else
  [[ ${flag[accelerator_type]} != v[23]-* ]] ||
    die "--node_count=${flag[node_count]}: several slices require TPU v4 or later"
  flag[queued]=true
  nodes=()
  for ((i = 0; i < flag[node_count]; i++)); do nodes+=("$name-$i"); done
  resource=queued-resources
  node_flags=("--node-count=${flag[node_count]}" "--node-prefix=$name")
  # All processes have to start together; by default, 64 workers are connected at a time.
  everywhere=(--node=all --worker=all --batch-size=all) first=(--node=0 --worker=0)
fi

# The commands are described below https://docs.cloud.google.com/sdk/gcloud/reference in
# compute/tpus/tpu-vm and compute/tpus/queued-resources: create, describe, delete, ssh, scp.
# With --force, the nodes of a queued resource are deleted first.
delete=("${tpus[@]}" tpu-vm delete "$name" "${place[@]}" --quiet)
[[ ${flag[queued]} == false ]] ||
  delete=("${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet)

scratch=""     # folder of temporary files
created=no     # whether this launcher created the slice: no, yes, or maybe
num_created=0  # how many times
started=no     # whether a run was started on the slice
state=UNKNOWN  # last known state of the slice
node=$name     # what is in this state
child=""       # process id of gcloud while it works on the slice
ready_since="" # when the slice last became ready, in seconds since the start
seconds_had=0  # how long the run has had slices that were lost
watcher=""     # process id of what interrupts this launcher if the run does not end

pause() { dry_run || sleep "${flag[poll_seconds]}"; }

# Prints the state of the VMs or of the queued resource; MISSING if it does not exist.
state_of() { # state_of tpu-vm|queued-resources NAME FIELD
  local command=("${tpus[@]}" "$1" describe "$2" "${place[@]}" "--format=value($3)")
  show "${command[@]}"
  if dry_run; then
    case $created-$1 in
      no-*) echo MISSING ;;
      *-tpu-vm) echo READY ;;
      *) echo ACTIVE ;;
    esac
  elif ! "${command[@]}" 2>"$scratch/errors"; then
    grep -q NOT_FOUND "$scratch/errors" || {
      cat "$scratch/errors" >&2
      return 1
    }
    echo MISSING
  fi
}

# Updates `state` and `node`: of several slices, the first that is not ready. A queued
# resource can be active although its VMs no longer exist.
# https://docs.cloud.google.com/tpu/docs/queued-resources
update_state() {
  node=$name
  if [[ ${flag[queued]} == true ]]; then
    state=$(state_of queued-resources "$name" state.state) || return 1
    [[ $state == ACTIVE ]] || return 0
  fi
  for node in "${nodes[@]}"; do
    state=$(state_of tpu-vm "$node" state) || return 1
    [[ $state == READY ]] || break
  done
  [[ ${flag[queued]} == false || $state != MISSING ]] || state=TERMINATED
}

# https://docs.cloud.google.com/tpu/docs/runtimes
runtime_version() {
  case ${flag[accelerator_type]} in
    v[234]-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7* | v7*) die "TPU7x and later require GKE: use launch/gke.sh" ;;
    *) die "the runtime image for ${flag[accelerator_type]} is unknown; set --version" ;;
  esac
}

create_slice() {
  local version=${flag[version]} options=("--accelerator-type=${flag[accelerator_type]}")
  [[ -n ${flag[accelerator_type]} ]] ||
    die "there is no slice $name in ${flag[zone]}; to create it, set --accelerator_type"
  [[ -n $version ]] || version=$(runtime_version)
  ((++num_created <= flag[attempts])) ||
    die "created $name ${flag[attempts]} times, but it was never ready"
  [[ ${flag[spot]} == false ]] || options+=(--spot)
  created=maybe
  if [[ ${flag[queued]} == true ]]; then
    run "${tpus[@]}" queued-resources create "$name" "${place[@]}" "${node_flags[@]}" \
      "${options[@]}" "--runtime-version=$version" "${create_flags[@]}"
  else
    run "${tpus[@]}" tpu-vm create "$name" "${place[@]}" \
      "${options[@]}" "--version=$version" "${create_flags[@]}"
  fi || {
    created=no
    die "could not create $name; existing resources with this name are not deleted"
  }
  created=yes
}

# Returns when the slice is ready.
get_slice() {
  while update_state || die "could not get the state of $name"; do
    case $state in
      READY)
        ready_since=$SECONDS
        return
        ;;
      MISSING) create_slice ;;
      FAILED) die "the request for $name failed; see the reason with gcloud describe" ;;
      PREEMPTED | TERMINATED | SUSPENDED | STOPPED | HIDDEN | UNKNOWN)
        [[ $created == yes ]] ||
          die "$node is $state and was not created by this launch; delete it first: $(quote "${delete[@]}")"
        run "${delete[@]}"
        ;;
      *)
        say "$node is $state; waiting"
        pause
        ;;
    esac
  done
}

# Like `run`, but a signal to this launcher interrupts it: bash handles signals during
# `wait`, and not during a command in the foreground.
attend() { # attend COMMAND...
  local status=0
  show "$@"
  dry_run && return
  "$@" &
  child=$!
  wait "$child" || status=$?
  child=""
  return "$status"
}

on_workers() { # on_workers COMMAND
  attend "${tpus[@]}" "$resource" ssh "$name" "${place[@]}" "${everywhere[@]}" \
    "${ssh_flags[@]}" "--command=$1"
}

# New VMs do not accept ssh immediately.
wait_for_workers() {
  local try
  for try in {1..5}; do
    on_workers true && return
    ((try == 5)) || pause
  done
  return 1
}

install_on_workers() {
  local command
  if [[ ${flag[install]} == checkout ]]; then
    attend "${tpus[@]}" "$resource" scp "$archive" "$name:rlt_jax.tar.gz" "${place[@]}" \
      "${everywhere[@]}" "${ssh_flags[@]}" || return
  fi
  command=$(install_command tpu)
  [[ -z $command ]] || on_workers "$command"
}

# Prints what is left of --max_hours.
seconds_left() { printf '%s' "$((max_seconds - seconds_had - (SECONDS - ready_since)))"; }

out_of_time() { [[ -n $max_seconds ]] && (($(seconds_left) <= 0)); }

# `timeout` on the workers ends the run, also when this launcher has lost its connection.
# Only the run itself is sent SIGTERM, not its child processes (--foreground).
run_on_workers() {
  if [[ -n $max_seconds ]]; then
    ! out_of_time || return 143
    wrapper=(timeout --foreground --preserve-status "--kill-after=${flag[grace_seconds]}s"
      "$(seconds_left)s")
  fi
  started=yes
  # shellcheck disable=SC2119  # on Cloud TPU the workers need no flags to connect
  on_workers "$(run_command)"
}

# Interrupts this launcher if it still waits for its slices long after --max_hours.
watch() {
  local seconds
  [[ -n $max_seconds ]] && ! dry_run || return 0
  seconds=$(($(seconds_left) + 2 * flag[grace_seconds]))
  (
    trap 'kill "$!"' TERM
    sleep "$seconds" &
    wait "$!" && kill -USR1 "$$"
  ) >/dev/null 2>&1 3>&- &
  watcher=$!
}

end_watch() {
  [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
  watcher=""
}

# Whether the slice is lost; its state can change some time after the run was preempted.
lost() {
  local try
  for try in {1..3}; do
    update_state || die "could not get the state of $name"
    [[ $state == READY ]] || return 0
    ((try == 3)) || pause
  done
  return 1
}

fetch_workdir() {
  dry_run || mkdir -p "${flag[fetch_to]}" || return
  run "${tpus[@]}" "$resource" scp "$name:$(remote_workdir)" "${flag[fetch_to]}" \
    "${place[@]}" "${first[@]}" --recurse "${ssh_flags[@]}"
}

finish() {
  local status=$? kept=""
  trap - EXIT
  trap '' USR1
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  end_watch
  trap 'say "interrupted; to delete $name: $(quote "${delete[@]}")"; exit 130' HUP INT TERM
  if [[ $started == yes && $state == READY ]] && fetches; then
    fetch_workdir || {
      kept="its workdir could not be copied"
      ((status)) || status=1
    }
  fi
  [[ ${flag[keep]} == false ]] || kept="--keep"
  [[ $created != maybe ]] || kept="its creation was interrupted"
  if [[ $created != no && -n $kept ]]; then
    say "$name is kept ($kept); to delete it: $(quote "${delete[@]}")"
  elif [[ $created == yes ]]; then
    run "${delete[@]}" || {
      say "could not delete $name; delete it with: $(quote "${delete[@]}")"
      ((status)) || status=1
    }
  fi
  [[ -z $scratch ]] || rm -rf "$scratch"
  exit "$status"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'say "the run did not end after --max_hours=${flag[max_hours]}"; exit 143' USR1

[[ -z ${flag[accelerator_type]} ]] ||
  say_cost "${flag[accelerator_type]}" "${flag[node_count]}" "${flag[max_hours]}"
[[ ${flag[spot]} == false ]] || on_bucket ||
  say "warning: --workdir=${flag[workdir]} is lost on preemption unless it is on mounted storage"
dry_run || scratch=$(mktemp -d)
archive=${scratch:-.}/rlt_jax.tar.gz
[[ ${flag[install]} != checkout ]] || pack_checkout "$archive"

for ((attempt = 1; ; attempt++)); do
  get_slice
  started=no status=0
  watch
  { wait_for_workers && install_on_workers && run_on_workers; } || status=$?
  end_watch
  ((status)) || break
  if ! out_of_time && ! lost; then
    say "the run failed with status $status"
    exit "$status"
  fi
  if out_of_time; then
    say "the run was ended after --max_hours=${flag[max_hours]}, with status $status; the same command continues it"
    exit "$status"
  fi
  if ((attempt >= flag[attempts])); then
    say "$node is $state after attempt $attempt, the last one; the run ended with status $status"
    exit "$status"
  fi
  seconds_had=$((seconds_had + SECONDS - ready_since))
  say "$node is $state; starting attempt $((attempt + 1)) of ${flag[attempts]}"
done
