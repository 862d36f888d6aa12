#!/usr/bin/env bash
# Runs rlt_jax on TPU slices of a GKE cluster with XPK, required for TPU7x and later.
#
#   launch/gke.sh --cluster=NAME --zone=ZONE --tpu_type=TYPE --workload=NAME \
#       --config=FILE --workdir=DIR [flags] [-- flags of rlt_jax.main]
#   launch/gke.sh --cluster=pods --zone=us-central1-a --tpu_type=tpu7x-16 \
#       --workload=rlt-1 --config=configs/rlt.py:gsm8k --storage=runs --workdir=/runs/rlt-1
#
# Submits a workload to an existing cluster and waits until it ends. The last commit of
# this checkout is added to --base_image and installed when the workload starts, unless
# --image is an image with rlt_jax. After a preemption, the cluster restarts the workload
# and the run resumes from its workdir, at most --max_restarts times; the same after exit
# status 75, with which processes end that have lost another one. A run that fails is not
# restarted. Interrupting this launcher leaves the workload running. Nothing is
# deleted: an existing workload of the same name is an error, and the cluster removes the
# pods of a finished workload. XPK has no time limit for a workload: `xpk workload delete`
# ends it.
#
# Every flag can also be set by an environment variable: RLT_ and its name in capitals;
# repeatable flags have one value per line there.
#
#   --cluster=NAME       GKE cluster, for example created by `xpk cluster create`
#   --zone=ZONE          zone of the cluster
#   --project=PROJECT    project of the cluster; by default the current gcloud project
#   --tpu_type=TYPE      TPU type of a slice in XPK: v5p-16, v6e-16, tpu7x-16, ...
#   --num_slices=1       number of slices; GKE connects the processes of all of them
#   --workload=NAME      name of the workload
#   --config=FILE        config of the run: in the checkout, or a path in the image
#   --workdir=DIR        workdir of the run: a folder on a mounted --storage
#   --base_image=python:3.12
#                        image to add the checkout to
#   --image=IMAGE        image with rlt_jax, to run without changes, such as one of the
#                        Dockerfile with the extra tpu
#   --storage=NAME       storage of the cluster to mount, for example a bucket attached
#                        with `xpk storage attach`; repeatable
#   --env=NAME=VALUE     environment variable of the run; repeatable
#   --max_restarts=10    maximum number of restarts
#   --xpk_flag=FLAG      flag of `xpk workload create`, such as --spot; repeatable
#   --wait=true          whether to wait for the end and return the status of the run
#   --dry_run            print the commands without running them
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"
. "$here/checks.sh"
. "$here/workers.sh"

declare -A flag=(
  [cluster]="" [zone]="" [project]="" [tpu_type]="" [num_slices]=1 [workload]=""
  [config]="" [workdir]="" [base_image]=python:3.12 [image]="" [storage]="" [env]=""
  [max_restarts]=10 [xpk_flag]="" [wait]=true [dry_run]=false
)
# shellcheck disable=SC2034  # read by parse_flags
repeatable=(storage env xpk_flag)
parse_flags "$@"
require cluster zone tpu_type workload config workdir
require_number num_slices
! on_bucket ||
  die "--workdir=${flag[workdir]}: attach the bucket to the cluster (docs/pods.md, GKE), and set --storage and a folder below its mount point"
[[ -n ${flag[storage]} ]] ||
  die "--workdir=${flag[workdir]} would be lost with the pods; use a folder on a mounted --storage"

refuse_local_config
if [[ -n ${flag[image]} ]]; then
  unchecked_config "in the image"
else
  require_committed_config
fi
say_cost "${flag[tpu_type]}" "${flag[num_slices]}"

place=("--cluster=${flag[cluster]}" "--zone=${flag[zone]}")
[[ -z ${flag[project]} ]] || place+=("--project=${flag[project]}")
mapfile -t xpk_flags < <(values xpk_flag)
for name in storage env; do
  while IFS= read -r value; do xpk_flags+=("--$name=$value"); done < <(values "$name")
done
scratch=""
trap '[[ -z $scratch ]] || rm -rf "$scratch"' EXIT

# With exec, signals reach the program, which saves a checkpoint before a preemption.
command="exec $(quote python -m rlt_jax.main "--config=${flag[config]}" \
  "--workdir=${flag[workdir]}" "${main_args[@]}")"
if [[ -n ${flag[image]} ]]; then
  image=("--docker-image=${flag[image]}")
else
  folder=rlt_jax_launch
  dry_run || scratch=$(mktemp -d) folder=$scratch
  run mkdir -p "$folder/checkout"
  pack_checkout "$folder/rlt_jax.tar.gz"
  run tar -xzf "$folder/rlt_jax.tar.gz" -C "$folder/checkout"
  image=("--base-docker-image=${flag[base_image]}" "--script-dir=$folder/checkout")
  command="python -m pip install --quiet -e '.[tpu]' && $command"
fi

# Without stdin, XPK does not offer to replace a workload of the same name. By default, XPK
# restarts a workload after the exit statuses 42 and 127 to 255, and not after others.
# https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md
# https://github.com/AI-Hypercomputer/xpk/blob/main/src/xpk/parser/workload.py
run xpk workload create "${place[@]}" "--workload=${flag[workload]}" \
  "--tpu-type=${flag[tpu_type]}" "--num-slices=${flag[num_slices]}" \
  "--max-restarts=${flag[max_restarts]}" --restart-on-exit-codes=75 "${image[@]}" \
  "${xpk_flags[@]}" "--command=$command" </dev/null
[[ ${flag[wait]} == false ]] ||
  run xpk workload list "${place[@]}" "--wait-for-job-completion=${flag[workload]}"
