#!/usr/bin/env bash
# Runs rlt_jax on GPU nodes under Slurm, one task a GPU.
#
#   launch/slurm.sh --gpus_per_node=8 --config=FILE --workdir=DIR \
#       [flags] [-- flags of rlt_jax.main]
#   launch/slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 \
#       --config=configs/gsm8k.py --workdir=/shared/gsm8k
#
# jax.distributed finds coordinator, number and id of the processes in Slurm's environment
# and gives each task of a node one of the GPUs that all of its tasks see: hence as many
# tasks a node as GPUs, none of them bound. When a task fails srun ends the others; its
# exit status is passed on. rlt_jax has to be installed where --python is found on every
# node, and the workdir must be one that all nodes see.
#
# Outside of an allocation srun asks for one. For runs that outlive the terminal and go on
# after preemption, put it into a batch job that Slurm may requeue:
#
#   sbatch --requeue --nodes=2 --gpus-per-node=8 --wrap="launch/slurm.sh --gpus_per_node=8 ..."
#
# Every flag can also be given as an environment variable: RLT_ and its name in capitals;
# flags that may be repeated have a line for each value there.
#
#   --gpus_per_node=N    GPUs of a node, and tasks on it
#   --config=FILE        config of the run
#   --workdir=DIR        workdir of the run, seen by all nodes
#   --nodes=N            number of nodes; in an allocation all of it by default
#   --time=HH:MM:SS      time limit
#   --partition=NAME     partition
#   --account=NAME       account
#   --cpus_per_task=N    CPU cores for each task
#   --srun_flag=FLAG     flag of srun, such as --exclusive; may be repeated
#   --python=python      Python that has rlt_jax
#   --dry_run            print the command, run nothing
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"

declare -A flag=(
  [gpus_per_node]="" [config]="" [workdir]="" [nodes]="" [time]="" [partition]=""
  [account]="" [cpus_per_task]="" [srun_flag]="" [python]=python [dry_run]=false
)
# shellcheck disable=SC2034  # read by parse_flags
repeatable=(srun_flag)
parse_flags "$@"
require gpus_per_node config workdir
require_number gpus_per_node

options=()
for name in nodes time partition account cpus_per_task; do
  [[ -z ${flag[$name]} ]] || options+=("--${name//_/-}=${flag[$name]}")
done
mapfile -t srun_flags < <(values srun_flag)

run srun --job-name=rlt_jax --kill-on-bad-exit=1 --label "${options[@]}" \
  "--ntasks-per-node=${flag[gpus_per_node]}" "--gpus-per-node=${flag[gpus_per_node]}" \
  --gpu-bind=none "${srun_flags[@]}" \
  "${flag[python]}" -m rlt_jax.main "--config=${flag[config]}" \
  "--workdir=${flag[workdir]}" "${main_args[@]}"
