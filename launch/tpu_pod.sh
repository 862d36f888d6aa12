#!/usr/bin/env bash
# Runs rlt_jax on all workers of a Cloud TPU slice (v4 to v6e).
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --accelerator_type=TYPE --config=FILE \
#       --workdir=DIR [flags] [-- flags of rlt_jax.main]
#   launch/tpu_pod.sh --name=rlt --zone=us-east5-b --accelerator_type=v6e-64 --queued \
#       --spot --config=configs/gsm8k.py --workdir=gs://bucket/gsm8k -- --config.seed=1
#
# Uses the slice of that name, or makes it; installs rlt_jax on its workers; runs the
# config on all of them and shows what they print; fetches the workdir from worker 0,
# unless it is on a bucket; and deletes the slice if it made it. A slice that was there
# before is never deleted. When the slice is preempted it is made again and the run goes on
# from its workdir, which therefore has to outlive the slice: a gs:// path, which every
# worker mounts with gcsfuse, or a folder on storage that --setup mounts. On several
# workers it must be one that all of them see.
# The exit status is that of the run.
#
# Every flag can also be given as an environment variable: RLT_ and its name in capitals;
# flags that may be repeated have a line for each value there.
#
#   --name=NAME          name of the slice, and of its queued resource
#   --zone=ZONE          its zone
#   --project=PROJECT    its project; by default the one gcloud is set to
#   --accelerator_type=TYPE
#                        what to make if there is no such slice: v5litepod-16, v6e-64, ...
#   --version=IMAGE      runtime image of the VMs; by default the one for the TPU's version
#   --queued             make a queued resource and wait for its turn
#   --spot               make it of spot capacity, which may be preempted
#   --create_flag=FLAG   flag of gcloud's create, such as --network=NAME; may be repeated
#   --config=FILE        config of the run: in the checkout, or a path on the workers
#   --workdir=DIR        workdir of the run: gs://BUCKET/PATH, or a folder
#   --install=checkout   checkout: the last commit of this checkout; none: what an earlier
#                        launch installed; else what pip is to install
#   --python=3.12        Python of the virtual environment, fetched if it is not there
#   --remote_dir=rlt_jax_launch
#                        folder on each worker, relative to the home, for all of this
#   --setup=COMMAND      shell command that each worker runs before the installation
#   --env=NAME=VALUE     environment variable of the run; may be repeated
#   --ssh_flag=FLAG      flag of gcloud's ssh and scp, such as --internal-ip; may be
#                        repeated
#   --fetch_to=runs      local folder that receives the workdir; none: not fetched
#   --keep               keep the slice also if this launcher made it
#   --attempts=10        how often the slice is made and the run started at most
#   --poll_seconds=30    pause between two looks at the state of the slice
#   --dry_run            print the commands for a slice that is not there, run nothing
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"
. "$here/workers.sh"

declare -A flag=(
  [name]="" [zone]="" [project]="" [accelerator_type]="" [version]="" [queued]=false
  [spot]=false [create_flag]="" [config]="" [workdir]="" [install]=checkout [python]=3.12
  [remote_dir]=rlt_jax_launch [setup]="" [env]="" [ssh_flag]="" [fetch_to]=runs
  [keep]=false [attempts]=10 [poll_seconds]=30 [dry_run]=false
)
# shellcheck disable=SC2034  # read by parse_flags
repeatable=(create_flag env ssh_flag)
parse_flags "$@"
require name zone config workdir
require_number attempts

name=${flag[name]}
place=("--zone=${flag[zone]}")
[[ -z ${flag[project]} ]] || place+=("--project=${flag[project]}")
mapfile -t create_flags < <(values create_flag)
mapfile -t ssh_flags < <(values ssh_flag)
tpus=(gcloud compute tpus)
delete=("${tpus[@]}" tpu-vm delete "$name" "${place[@]}" --quiet)
[[ ${flag[queued]} == false ]] ||
  delete=("${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet)

scratch=""     # folder of temporary files
made=no        # whether this launcher made the slice: no, yes, or maybe
times_made=0   # how often
started=no     # whether a run was started on it
state=UNKNOWN  # of the slice, at the last look
child=""       # process id of gcloud while it shows what the run prints

pause() { dry_run || sleep "${flag[poll_seconds]}"; }

# Prints the state of the VMs or of the queued resource; MISSING if there is none.
state_of() { # state_of tpu-vm|queued-resources FIELD
  local command=("${tpus[@]}" "$1" describe "$name" "${place[@]}" "--format=value($2)")
  show "${command[@]}"
  if dry_run; then
    case $made-$1 in
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

# A queued resource can stay active while its VMs are gone.
look() {
  if [[ ${flag[queued]} == true ]]; then
    state=$(state_of queued-resources state.state) || return 1
    [[ $state == ACTIVE ]] || return 0
  fi
  state=$(state_of tpu-vm state) || return 1
  [[ ${flag[queued]} == false || $state != MISSING ]] || state=TERMINATED
}

runtime_version() {
  case ${flag[accelerator_type]} in
    v[234]-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7* | v7*) die "TPU7x and later are reached through GKE: see launch/gke.sh" ;;
    *) die "no runtime image is known for ${flag[accelerator_type]}; name one with --version" ;;
  esac
}

make_slice() {
  local version=${flag[version]} options=("--accelerator-type=${flag[accelerator_type]}")
  [[ -n ${flag[accelerator_type]} ]] ||
    die "there is no slice $name in ${flag[zone]}; to make it, give --accelerator_type"
  [[ -n $version ]] || version=$(runtime_version)
  ((++times_made <= flag[attempts])) || die "made $name ${flag[attempts]} times in vain"
  [[ ${flag[spot]} == false ]] || options+=(--spot)
  made=maybe
  if [[ ${flag[queued]} == true ]]; then
    run "${tpus[@]}" queued-resources create "$name" "${place[@]}" "--node-id=$name" \
      "${options[@]}" "--runtime-version=$version" "${create_flags[@]}"
  else
    run "${tpus[@]}" tpu-vm create "$name" "${place[@]}" \
      "${options[@]}" "--version=$version" "${create_flags[@]}"
  fi || {
    made=no
    die "could not make $name; whatever exists under this name is left alone"
  }
  made=yes
}

# Returns when the slice can be used.
get_slice() {
  while look || die "could not ask for the state of $name"; do
    case $state in
      READY) return ;;
      MISSING) make_slice ;;
      FAILED) die "the request for $name has failed; for the reason, describe it with gcloud" ;;
      PREEMPTED | TERMINATED | SUSPENDED | STOPPED | HIDDEN | UNKNOWN)
        [[ $made == yes ]] ||
          die "$name is $state, not made by this launch; delete it first: $(quote "${delete[@]}")"
        run "${delete[@]}"
        ;;
      *)
        say "$name is $state; waiting"
        pause
        ;;
    esac
  done
}

on_workers() { # on_workers run|become COMMAND
  "$1" "${tpus[@]}" tpu-vm ssh "$name" "${place[@]}" --worker=all "${ssh_flags[@]}" "--command=$2"
}

# New VMs take a while to let anyone in.
reach_workers() {
  local try
  for try in {1..5}; do
    on_workers run true && return
    ((try == 5)) || pause
  done
  return 1
}

install_on_workers() {
  local command
  if [[ ${flag[install]} == checkout ]]; then
    run "${tpus[@]}" tpu-vm scp "$archive" "$name:rlt_jax.tar.gz" "${place[@]}" \
      --worker=all "${ssh_flags[@]}" || return
  fi
  command=$(install_command tpu)
  [[ -z $command ]] || on_workers run "$command"
}

run_on_workers() {
  local status=0
  started=yes
  # shellcheck disable=SC2119  # the workers find each other without flags
  on_workers become "$(run_command)" &
  child=$! # a signal ends `wait` at once, but would wait for the end of a command
  wait "$child" || status=$?
  child=""
  return "$status"
}

# Whether the slice is gone; a preemption may show in its state later than in the run.
lost() {
  local try
  for try in {1..3}; do
    look || die "could not ask for the state of $name"
    [[ $state == READY ]] || return 0
    ((try == 3)) || pause
  done
  return 1
}

fetch_workdir() {
  dry_run || mkdir -p "${flag[fetch_to]}" || return
  run "${tpus[@]}" tpu-vm scp "$name:$(remote_workdir)" "${flag[fetch_to]}" "${place[@]}" \
    --worker=0 --recurse "${ssh_flags[@]}"
}

finish() {
  local status=$? kept=""
  trap - EXIT
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  trap 'say "interrupted; to delete $name: $(quote "${delete[@]}")"; exit 130' HUP INT TERM
  if [[ $started == yes && $state == READY ]] && fetches; then
    fetch_workdir || {
      kept="its workdir could not be fetched"
      ((status)) || status=1
    }
  fi
  [[ ${flag[keep]} == false ]] || kept="--keep"
  [[ $made != maybe ]] || kept="making it was interrupted"
  if [[ $made != no && -n $kept ]]; then
    say "$name is kept ($kept); to delete it: $(quote "${delete[@]}")"
  elif [[ $made == yes ]]; then
    run "${delete[@]}" || {
      say "could not delete $name; to try again: $(quote "${delete[@]}")"
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

[[ ${flag[spot]} == false ]] || on_bucket ||
  say "warning: a preemption loses --workdir=${flag[workdir]} unless it is on mounted storage"
dry_run || scratch=$(mktemp -d)
archive=${scratch:-.}/rlt_jax.tar.gz
[[ ${flag[install]} != checkout ]] || pack_checkout "$archive"

for ((attempt = 1; ; attempt++)); do
  get_slice
  started=no status=0
  { reach_workers && install_on_workers && run_on_workers; } || status=$?
  ((status)) || break
  if ! lost; then
    say "the run failed with status $status"
    exit "$status"
  fi
  if ((attempt >= flag[attempts])); then
    say "$name is $state after attempt $attempt, the last; the run ended with status $status"
    exit "$status"
  fi
  say "$name is $state; attempt $((attempt + 1)) of ${flag[attempts]} follows"
done
