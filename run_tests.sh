#!/usr/bin/env bash
# Lint, types and tests, on a machine with nothing but Python.
#   ./run_tests.sh            everything
#   ./run_tests.sh --quick    without what is slow
#   ./run_tests.sh [--quick] PYTEST-ARGUMENTS...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$root/scripts/ensure_venv.sh" requirements.txt requirements-dev.txt)
bin=$(dirname "$python")
cd "$root"

selection=()
if [ "${1:-}" = --quick ]; then
  selection=(-m "not slow and not gpu")
  shift
fi

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/shellcheck" -- *.sh */*.sh .ci/run
# Once for the many processes of the tests, which write none: one on a full disk would leave half a file.
"$python" -m compileall -q qlora_dpo eval benchmarks tests
# One thread per worker: two workers on two cores are faster than one with two threads, and sums are repeatable.
OMP_NUM_THREADS=1 exec "$python" -m pytest -n 2 --dist worksteal "${selection[@]}" "$@"
