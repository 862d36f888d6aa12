# shellcheck shell=bash
# Flags, help and printed commands of the launchers; sourced, not run.
#
# A launcher defines its flags with their defaults in the associative array `flag`, and
# the names of repeatable flags in `repeatable`; `parse_flags "$@"` sets their values.
# Arguments after `--` are in `main_args`. Every flag NAME has an environment variable
# RLT_NAME; a flag on the command line overrides it.

needs_bash() { # needs_bash MAJOR MINOR
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= $1 * 100 + $2)) ||
    die "bash $1.$2 or newer is required, this is $BASH_VERSION"
}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 2
}

needs_bash 4 4

# The comment at the top of the launcher.
show_help() { sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "$0"; }

# shellcheck disable=SC2034  # main_args is read by the launchers
parse_flags() {
  local name value variable
  main_args=()
  for name in "${!flag[@]}"; do
    variable=RLT_${name^^}
    [[ -z ${!variable-} ]] || set_flag "$name" "${!variable}"
  done
  local given=" "
  while (($#)); do
    case $1 in
      -h | --help)
        show_help
        exit 0
        ;;
      --)
        main_args=("${@:2}")
        break
        ;;
      --*=*) name=${1%%=*} value=${1#*=} ;;
      --*) name=$1 value=true ;;
      *) die "unexpected '$1'; flags are --name=value; flags of rlt_jax.main go after --" ;;
    esac
    name=${name#--}
    [[ -n ${flag[$name]+known} ]] ||
      die "unknown flag --$name; see --help; flags of rlt_jax.main go after --"
    [[ $1 == *=* || ${flag[$name]} == @(true|false) ]] ||
      die "--$name needs a value: --$name=VALUE"
    if [[ " ${repeatable[*]-} " == *" $name "* && $given == *" $name "* ]]; then
      value=${flag[$name]}$'\n'$value
    fi
    given+="$name "
    set_flag "$name" "$value"
    shift
  done
  exec 3>&1 # output of a dry run, also from inside $(...)
}

set_flag() { # set_flag NAME VALUE
  [[ ${flag[$1]} != @(true|false) || $2 == @(true|false) ]] ||
    die "--$1 must be true or false, not '$2'"
  flag[$1]=$2
}

require() { # require NAME...: exits with a message if any of the flags has no value
  local name missing=()
  for name; do
    [[ -n ${flag[$name]} ]] || missing+=("--$name (or RLT_${name^^})")
  done
  ((${#missing[@]} == 0)) || die "missing: $(join ', ' "${missing[@]}"); see --help"
}

require_number() { # require_number NAME...: the flags must be positive integers
  local name
  for name; do
    [[ ${flag[$name]} =~ ^[1-9][0-9]*$ ]] ||
      die "--$name must be a positive integer, not '${flag[$name]}'"
  done
}

join() { # join SEPARATOR WORD...
  local text=${2-} word
  for word in "${@:3}"; do text+=$1$word; done
  printf '%s' "$text"
}

# Prints the values of a repeatable flag, one per line.
values() { [[ -z ${flag[$1]} ]] || printf '%s\n' "${flag[$1]}"; }

# Prints words quoted for the shell, on one line.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  join ' ' "${words[@]}"
}

dry_run() { [[ ${flag[dry_run]} == true ]]; }

# Prints a command: to stdout in a dry run, otherwise to stderr.
show() {
  if dry_run; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    printf '+ %s\n' "$(quote "$@")" >&2
  fi
}

# Prints a command and runs it, unless this is a dry run.
run() {
  show "$@"
  dry_run || "$@"
}

# Like `run`, but replaces the shell with the command, so that signals reach the command.
become() {
  show "$@"
  dry_run || exec "$@"
}
