#!/usr/bin/env bash
# Wall time and peak memory of an export, time of --help and of a training step, on SmolLM2-135M.
#
#   bash tools/bench_export.sh [--runs N]
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
. tools/_venv.sh
ensure_venv || exit 1
exec "$VENV/bin/python" tools/bench_export.py "$@"
