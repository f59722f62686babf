#!/usr/bin/env bash
# Training steps and network evaluations in bfloat16 on one accelerator, with torch beside them: 10 minutes at most.
# Every row is written when it is measured; a run that was stopped goes on where it was. See accelerator.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python benchmarks/accelerator.py "$@"
