# shellcheck shell=bash
# shellcheck disable=SC2154  # the launcher defines `flag`
# Runs several processes and ends all of them when one fails; sourced after flags.sh.

needs_bash 5 1

# together COUNT FUNCTION: runs `FUNCTION I` for I from 0 to COUNT - 1 in parallel, with
# output prefixed by [I]. If one fails or a signal arrives, ends the others. Returns the
# first nonzero status. FUNCTION has to end in `exec`, so that signals reach its command.
together() {
  local count=$1 function=$2 id pid out code status=0 signalled=0
  local -A id_of=()
  local printers=()
  trap 'signalled=129' HUP
  trap 'signalled=130' INT
  trap 'signalled=143' TERM
  for ((id = 0; id < count; id++)); do
    exec {out}> >(
      trap '' HUP INT TERM # keeps printing while the processes end
      while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$id" "${line%$'\r'}"; done
    )
    printers+=($!)
    "$function" "$id" </dev/null >&"$out" 2>&1 {out}>&- &
    id_of[$!]=$id
    exec {out}>&-
  done
  while ((${#id_of[@]} && !status && !signalled)); do
    pid="" code=0
    wait -n -p pid "${!id_of[@]}" || code=$?
    [[ -n ${pid-} ]] || continue # a signal interrupted the wait
    ((code == 0)) || say "process ${id_of[$pid]} ended with status $code; ending the others"
    status=$code
    unset "id_of[$pid]"
  done
  if ((signalled)); then
    say "stopped by a signal; ending all processes"
    status=$signalled
  fi
  ((${#id_of[@]} == 0)) || end_processes "${!id_of[@]}"
  trap - HUP INT TERM
  until_gone 5 "${printers[@]}" || kill -KILL "${printers[@]}" 2>/dev/null || true
  return "$status"
}

# Terminates processes, and kills them after --grace_seconds.
end_processes() {
  kill -TERM "$@" 2>/dev/null || true
  until_gone "${flag[grace_seconds]}" "$@" || kill -KILL "$@" 2>/dev/null || true
}

until_gone() { # until_gone SECONDS PID...: fails if processes are left after that time
  local deadline=$((SECONDS + $1))
  while kill -0 "${@:2}" 2>/dev/null; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}
