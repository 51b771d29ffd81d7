#!/usr/bin/env bash
# Checks bundles with a newer onnx than Paddle2ONNX can be installed beside. The onnx of the product's
# own environment does not know the operators of opset 23, which fused graphs are made of.
#
#     bash tools/check_newer_onnx.sh                     small models of all families
#     bash tools/check_newer_onnx.sh --family llama      of these only
#     bash tools/check_newer_onnx.sh --base DIR          and a checkpoint of yours, such as SmolLM2-135M
#
# Every graph goes through onnx.checker with full checks and through strict shape inference, and those
# of small models through onnx's reference implementation, in numpy, whose outputs are compared with
# onnxruntime's: another reading of the standard than ours and than onnxruntime's.
# onnx goes into tools/.venv-newer-onnx, through pip as the user has configured it.

set -euo pipefail
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/_venv.sh
source "$TOOLS/_venv.sh"
ensure_venv || exit 1

NEWER=$TOOLS/.venv-newer-onnx
PACKAGES=(onnx==1.23.2 onnxruntime==1.32.0)
if [ "$(cat "$NEWER/.packages" 2>/dev/null || true)" != "${PACKAGES[*]}" ]; then
    echo "Installing ${PACKAGES[*]} into tools/.venv-newer-onnx …" >&2
    "$VENV/bin/python" -m venv --clear "$NEWER"
    "$NEWER/bin/python" -m pip install --quiet --disable-pip-version-check "${PACKAGES[@]}"
    echo "${PACKAGES[*]}" >"$NEWER/.packages"
fi

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
PYTHONPATH=$ROOT "$VENV/bin/python" "$TOOLS/newer_onnx_bundles.py" "$WORK" "$@"
"$NEWER/bin/python" "$TOOLS/check_newer_onnx.py" "$WORK"
