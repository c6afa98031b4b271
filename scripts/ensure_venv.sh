#!/usr/bin/env bash
# Makes a virtual environment with the given requirements, if it is not there already, and prints its Python.
#   ensure_venv.sh REQUIREMENTS...      the environment is .venv, or the one that QLORA_DPO_VENV names
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${QLORA_DPO_VENV:-$root/.venv}

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed and not on the PATH. Install it, then run this again." >&2
  exit 1
}

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  echo "Making the virtual environment $venv (once)." >&2
  if ! "$python" -m venv "$venv" >&2; then
    rm -rf "$venv"
    echo "error: $python -m venv failed. On Debian and Ubuntu: apt-get install python3-venv." >&2
    exit 1
  fi
fi

arguments=()
for file in "$@"; do arguments+=(-r "$root/$file"); done
wanted=$(cd "$root" && cat "$@" | sha256sum | cut -d' ' -f1)
stamp=$venv/.installed-$(echo "$*" | tr -c 'a-z\n' '-')
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing $* into $venv (once; a few minutes)." >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" >&2
  echo "$wanted" >"$stamp"
fi
echo "$venv/bin/python"
