#!/usr/bin/env bash
# The same as ../run_dpo_training.sh, for those who start from this folder.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/../run_dpo_training.sh" "$@"
