#!/usr/bin/env bash
# The whole way on a real model: fetch SmolLM2-135M, fine-tune it with LoRA, export it to ONNX with
# the check against Paddle, and ask it the same questions before and after.
#
#   bash tools/demo.sh
#
# Needs Python 3.10 to 3.12 and pip, nothing else; works in .demo.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
. tools/_venv.sh
ensure_venv || exit 1
exec "$VENV/bin/python" tools/demo.py "$@"
