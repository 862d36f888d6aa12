# shellcheck shell=bash
# Flags, help and printed commands of the launchers; sourced, not run.
#
# A launcher lists its flags with their defaults in the associative array `flag`, and
# those that may be repeated in `repeatable`; `parse_flags "$@"` fills them in. What
# follows `--` ends up in `main_args`. Every flag NAME has an environment variable
# RLT_NAME, which a flag on the command line overrides.

needs_bash() { # needs_bash MAJOR MINOR
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= $1 * 100 + $2)) ||
    die "bash $1.$2 or newer is needed, this is $BASH_VERSION"
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
      *) die "unexpected '$1'; flags are --name=value, those of rlt_jax.main follow --" ;;
    esac
    name=${name#--}
    [[ -n ${flag[$name]+known} ]] ||
      die "unknown flag --$name; see --help, flags of rlt_jax.main follow --"
    [[ $1 == *=* || ${flag[$name]} == @(true|false) ]] ||
      die "--$name needs a value: --$name=VALUE"
    if [[ " ${repeatable[*]-} " == *" $name "* && $given == *" $name "* ]]; then
      value=${flag[$name]}$'\n'$value
    fi
    given+="$name "
    set_flag "$name" "$value"
    shift
  done
  exec 3>&1 # what a dry run prints, also from inside $(...)
}

set_flag() { # set_flag NAME VALUE
  [[ ${flag[$1]} != @(true|false) || $2 == @(true|false) ]] ||
    die "--$1 is true or false, not '$2'"
  flag[$1]=$2
}

require() { # require NAME...: ends with one message that names all that is missing
  local name missing=()
  for name; do
    [[ -n ${flag[$name]} ]] || missing+=("--$name (or RLT_${name^^})")
  done
  ((${#missing[@]} == 0)) || die "missing: $(join ', ' "${missing[@]}"); see --help"
}

require_number() { # require_number NAME...: whole numbers above zero
  local name
  for name; do
    [[ ${flag[$name]} =~ ^[1-9][0-9]*$ ]] ||
      die "--$name is a number above zero, not '${flag[$name]}'"
  done
}

join() { # join SEPARATOR WORD...
  local text=${2-} word
  for word in "${@:3}"; do text+=$1$word; done
  printf '%s' "$text"
}

# The values of a repeatable flag, a line each.
values() { [[ -z ${flag[$1]} ]] || printf '%s\n' "${flag[$1]}"; }

# Words as one line that a shell reads back as the same words.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  join ' ' "${words[@]}"
}

dry_run() { [[ ${flag[dry_run]} == true ]]; }

# Prints a command: a dry run to stdout, to be pasted; else to stderr.
show() {
  if dry_run; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    printf '+ %s\n' "$(quote "$@")" >&2
  fi
}

# Prints a command and, but for a dry run, runs it.
run() {
  show "$@"
  dry_run || "$@"
}

# The same, but the shell becomes the command: what is signalled is the command itself.
become() {
  show "$@"
  dry_run || exec "$@"
}
