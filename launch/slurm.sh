#!/usr/bin/env bash
# Runs rlt_jax on GPU nodes under Slurm, one task per GPU.
#
#   launch/slurm.sh --gpus_per_node=8 --config=FILE --workdir=DIR \
#       [flags] [-- flags of rlt_jax.main]
#   launch/slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 \
#       --config=configs/rlt.py:gsm8k --workdir=/shared/gsm8k
#
# jax.distributed reads the coordinator, number and id of the processes from Slurm's
# environment, and assigns one GPU of the node to each of its tasks. This requires one task
# per GPU, and all GPUs of the node must be visible to every task. If a task fails, srun
# terminates the others and its exit status is returned. rlt_jax must be installed for
# --python on every node, and the workdir must be on shared storage.
#
# Outside of an allocation, srun requests one. For runs that continue after the terminal is
# closed and resume after preemption, use a batch job that Slurm can requeue:
#
#   sbatch --requeue --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 \
#       --wrap="launch/slurm.sh --gpus_per_node=8 ..."
#
# Every flag can also be set by an environment variable: RLT_ and its name in capitals;
# repeatable flags have one value per line there.
#
#   --gpus_per_node=N    number of GPUs, and tasks, per node
#   --config=FILE        config of the run: a path on this machine, or in the container
#   --workdir=DIR        workdir of the run, on shared storage
#   --nodes=N            number of nodes; by default all nodes of the allocation
#   --time=HH:MM:SS      time limit
#   --partition=NAME     partition
#   --account=NAME       account
#   --cpus_per_task=N    CPU cores per task; by default those of the allocation
#   --srun_flag=FLAG     flag of srun, such as --exclusive; repeatable
#   --python=python      Python with rlt_jax installed
#   --container_image=IMAGE
#                        image with rlt_jax for Slurm's plugin pyxis: REGISTRY#IMAGE:TAG, or
#                        a squashfs file on the nodes
#   --container_mounts=SRC:DST,...
#                        folders of the nodes to mount in the container, such as the workdir
#   --container_workdir=/app
#                        folder of the container in which the run starts
#   --dry_run            print the command without running it
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"
. "$here/checks.sh"

declare -A flag=(
  [gpus_per_node]="" [config]="" [workdir]="" [nodes]="" [time]="" [partition]=""
  [account]="" [cpus_per_task]="" [srun_flag]="" [python]=python
  [container_image]="" [container_mounts]="" [container_workdir]=/app [dry_run]=false
)
# shellcheck disable=SC2034  # read by parse_flags
repeatable=(srun_flag)
parse_flags "$@"
require gpus_per_node config workdir
require_number gpus_per_node
# Since Slurm 22.05, srun does not take --cpus-per-task from sbatch and salloc.
: "${flag[cpus_per_task]:=${SLURM_CPUS_PER_TASK-}}"

options=()
for name in nodes time partition account cpus_per_task; do
  [[ -z ${flag[$name]} ]] || options+=("--${name//_/-}=${flag[$name]}")
done
mapfile -t srun_flags < <(values srun_flag)

# https://github.com/NVIDIA/pyxis/wiki/Usage
if [[ -n ${flag[container_image]} ]]; then
  unchecked_config "in the container"
  options+=("--container-image=${flag[container_image]}"
    "--container-workdir=${flag[container_workdir]}")
  [[ -z ${flag[container_mounts]} ]] ||
    options+=("--container-mounts=${flag[container_mounts]}")
elif [[ ${flag[config]} == /* || ${flag[srun_flag]} == *--chdir* ]]; then
  [[ -f $(config_file) ]] || unchecked_config "on the nodes"
else
  require_config_here # srun starts the tasks in the current directory
fi

# https://slurm.schedmd.com/srun.html
run srun --job-name=rlt_jax --kill-on-bad-exit=1 --label "${options[@]}" \
  "--ntasks-per-node=${flag[gpus_per_node]}" "--gpus-per-node=${flag[gpus_per_node]}" \
  --gpu-bind=none "${srun_flags[@]}" \
  "${flag[python]}" -m rlt_jax.main "--config=${flag[config]}" \
  "--workdir=${flag[workdir]}" "${main_args[@]}"
