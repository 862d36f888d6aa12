#!/usr/bin/env bash
# Runs the seeds of an experiment side by side on this machine, a process each. Given
# again, it resumes.
#
#   launch/seeds.sh --config=FILE --workdir=DIR [flags] [-- flags of rlt_jax.main]
#   launch/seeds.sh --config=experiments/paper_small.py --workdir=runs/paper_small \
#       --seeds=0,1,2,3
#
# FILE:SEED is the recipe's config of one seed.
# For CPUs: a GPU or TPU takes one process, so give its seeds one after the other.
# Each line of output is prefixed with the place of its seed in the list. When one process
# fails the others are ended; the exit status is that of the first that failed.
#
# Every flag can also be given as an environment variable: RLT_ and its name in capitals.
#
#   --config=FILE              recipe
#   --workdir=DIR              workdir of all seeds
#   --seeds=SEEDS              which; 0,1,2 by default
#   --compilation_cache=DIR    compiled programs, shared by all; WORKDIR/programs by default
#   --python=python            Python that has rlt_jax
#   --grace_seconds=30         time that processes have to end before they are killed
#   --dry_run                  print the commands, run nothing
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/flags.sh"
. "$here/checks.sh"
. "$here/processes.sh"

declare -A flag=(
  [config]="" [workdir]="" [seeds]="" [compilation_cache]="" [python]=python
  [grace_seconds]=30 [dry_run]=false
)
parse_flags "$@"
require config workdir
require_number grace_seconds
require_config_here
: "${flag[seeds]:=0,1,2}"
: "${flag[compilation_cache]:=${flag[workdir]}/programs}"
[[ ${flag[seeds]} =~ ^[0-9]+(,[0-9]+)*$ ]] ||
  die "--seeds is a list of numbers such as 0,1,2, not '${flag[seeds]}'"
IFS=, read -ra seeds <<<"${flag[seeds]}"

[[ -z $(printf '%s\n' "${seeds[@]}" | sort | uniq -d) ]] || die "--seeds names one twice"

# More threads than cores would only wait for each other.
threads() {
  local cores=$(($(nproc) / ${#seeds[@]}))
  printf '%s' "$((cores > 0 ? cores : 1))"
}

one() { # one I: runs the seed at this place in the list
  local command=(
    env PYTHONUNBUFFERED=1 "NPROC=$(threads)" "${flag[python]}" -m rlt_jax.main
    "--config=${flag[config]}:${seeds[$1]}" "--workdir=${flag[workdir]}"
    "--compilation_cache=${flag[compilation_cache]}" "${main_args[@]}"
  )
  become "${command[@]}"
}

if dry_run; then
  for ((i = 0; i < ${#seeds[@]}; i++)); do one "$i"; done
else
  together "${#seeds[@]}" one
fi
