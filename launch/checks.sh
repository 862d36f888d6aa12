# shellcheck shell=bash
# shellcheck disable=SC2154  # the launcher defines `flag`
# What is checked and printed before anything is created; sourced after flags.sh.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The file of --config: `configs/x.py:argument` is the file configs/x.py.
config_file() { printf '%s' "${flag[config]%%:*}"; }

unchecked_config() {
  say "--config=${flag[config]}: whether this file exists $1 cannot be checked from here"
}

# For launchers that run on this machine, in the current directory.
require_config_here() {
  [[ -f $(config_file) ]] ||
    die "--config=${flag[config]}: there is no file $(config_file); this is $PWD"
}

# For launchers that run on machines with no access to the disk of this one.
refuse_local_config() {
  local file
  file=$(config_file)
  [[ $file != "$checkout"/* ]] ||
    die "--config=${flag[config]} is a path of this machine; set --config=${flag[config]#"$checkout"/}"
}

# For launchers that install the last commit of the checkout and run in its folder.
require_committed_config() {
  local file
  file=$(config_file)
  if [[ $file == /* ]]; then
    unchecked_config "where the run works"
  elif [[ $(git -C "$checkout" cat-file -t "HEAD:./$file" 2>/dev/null) != blob ]]; then
    [[ ! -f $checkout/$file ]] ||
      die "--config=${flag[config]}: $file is not committed, and the last commit is what is installed"
    die "--config=${flag[config]}: there is no file $file in the checkout $checkout"
  fi
}

# Prints the number of chips of a slice; nothing for a type that is unknown. The number in
# a type counts TensorCores, of which v2 to v5p and TPU7x have two per chip, and v5e and
# v6e one. XPK also has types with a topology, such as tpu7x-4x4x8.
# https://docs.cloud.google.com/tpu/docs/v4, .../v5p, .../v5e, .../v6e, .../tpu7x
# https://github.com/AI-Hypercomputer/xpk/blob/main/src/xpk/core/system_characteristics.py
chips_of() { # chips_of TYPE
  local size=${1##*-}
  [[ $size =~ ^[1-9][0-9]*(x[1-9][0-9]*)*$ ]] || return 0
  case $1 in
    *-*x*) printf '%s' "$((${size//x/*}))" ;;
    v[2-4]-* | v5p-* | tpu7-* | tpu7x-*) printf '%s' "$(((size + 1) / 2))" ;;
    v5litepod-* | v6e-*) printf '%s' "$size" ;;
  esac
}

# Prints what slices cost, before they are created.
say_cost() { # say_cost TYPE SLICES [HOURS]
  local chips slices=$1 s=s
  (($2 == 1)) || slices="$2 x $1"
  chips=$(chips_of "$1")
  if [[ -z $chips ]]; then
    say "$slices: unknown number of chips, so the cost is unknown"
    return
  fi
  chips=$((chips * $2))
  ((chips > 1)) || s=""
  if [[ -z ${3-} ]]; then
    say "$slices: $chips chip$s, $chips chip-hour$s for every hour"
  else
    say "$slices: $chips chip$s, at most $(calculate "$chips * $3") chip-hours with --max_hours=$3"
  fi
}

# Prints the value of an expression of decimal numbers.
calculate() { awk "BEGIN { printf \"%.10g\", $1 }"; }
