#!/usr/bin/env bash
# Align a model with DPO on one GPU, or on this CPU. Without arguments: the embedded demo.
#   ./run_dpo_training.sh
#   ./run_dpo_training.sh --dataset PAIRS      trains the model of $MODEL_PATH, or the embedded one
#   ./run_dpo_training.sh --model_name_or_path MODEL --dataset PAIRS [any option of `python -m qlora_dpo train --help`]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$root/scripts/ensure_venv.sh" requirements.txt)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ $# -eq 0 ]; then
  exec "$python" -m eval demo
fi
exec "$python" -m qlora_dpo train "$@"
