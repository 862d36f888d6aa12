# shellcheck shell=bash
# shellcheck disable=SC2154  # the launcher defines `flag` and `main_args`
# Commands that run on remote machines; sourced after flags.sh and checks.sh.

# The system's Python may be too old for rlt_jax, so uv, installed for this user only,
# downloads the requested version.
install_command() { # install_command EXTRA: prints the command that installs rlt_jax
  local folder python target steps=()
  folder=$(quote "${flag[remote_dir]}")
  python=$(quote "--python=${flag[python]}")
  [[ -z ${flag[setup]} ]] || steps+=("(${flag[setup]})")
  if [[ ${flag[install]} != none ]]; then
    steps+=("mkdir -p $folder")
    target=$(quote "${flag[install]}")
    if [[ ${flag[install]} == checkout ]]; then
      steps+=("tar -xzf rlt_jax.tar.gz -C $folder")
      target="-e $(quote ".[$1]")"
    fi
    steps+=(
      "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv"
      "cd $folder"
      "python3 -m uv venv --quiet --allow-existing $python .venv"
      "python3 -m uv pip install --quiet --python=.venv/bin/python $target"
    )
  fi
  join ' && ' "${steps[@]}"
}

wrapper=() # words before the command of the run

run_command() { # run_command FLAG...: prints the command that runs rlt_jax.main
  local variables workdir=${flag[workdir]} steps=()
  mapfile -t variables < <(values env)
  steps+=("cd $(quote "${flag[remote_dir]}")")
  if on_bucket; then
    workdir=gs/${workdir#gs://}
    steps+=("$(mount_command)")
  fi
  steps+=("mkdir -p $(quote "$workdir")")
  steps+=("exec $(quote "${wrapper[@]}" env "${variables[@]}" .venv/bin/python -m rlt_jax.main \
    "--config=${flag[config]}" "--workdir=$workdir" "$@" "${main_args[@]}")")
  join ' && ' "${steps[@]}"
}

on_bucket() { [[ ${flag[workdir]} == gs://* ]]; }

# Prints the command that mounts the bucket of the workdir at gs/BUCKET. Orbax renames the
# folders of checkpoints; caching is off because other workers write to the bucket.
mount_command() {
  local bucket folder
  bucket=${flag[workdir]#gs://}
  bucket=${bucket%%/*}
  folder=$(quote "gs/$bucket")
  printf '%s' "mkdir -p $folder && { mountpoint -q $folder || gcsfuse --implicit-dirs" \
    " --rename-dir-limit=100000 --metadata-cache-ttl-secs=0" \
    " --metadata-cache-negative-ttl-secs=0 $(quote "$bucket") $folder; }"
}

fetches() { [[ ${flag[fetch_to]} != none ]] && ! on_bucket; }

remote_workdir() {
  if [[ ${flag[workdir]} == /* ]]; then
    printf '%s' "${flag[workdir]}"
  else
    printf '%s/%s' "${flag[remote_dir]}" "${flag[workdir]}"
  fi
}

# Archives the last commit of the checkout of this launcher.
pack_checkout() { # pack_checkout ARCHIVE
  if ! dry_run && [[ -n $(git -C "$checkout" status --porcelain) ]]; then
    say "warning: uncommitted changes are not included"
  fi
  run git -C "$checkout" archive --format=tar.gz "--output=$1" HEAD
}
