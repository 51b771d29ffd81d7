#!/usr/bin/env bash
# Holds bundles against Hugging Face's libraries, which need torch and so are no part of the tests:
#
#     bash tools/check_peers.sh [BASE]
#
# optimum's ORTModelForCausalLM loads a base and a merged bundle as they are and generates the same
# tokens; PEFT's LoRA on the same base gives the same logits as the merged bundle, and PEFT's prefix
# the same tokens as the bundle behind that prefix. BASE is a Hugging Face folder of a Llama-type
# model with a tokenizer.json; a tiny model is made when it is left out.
#
# The libraries go into tools/.venv-peers, through pip as the user has configured it. PyPI's torch
# for Linux on x86-64 brings CUDA; a CPU build is enough, so give pip the index that has it
# (PIP_EXTRA_INDEX_URL), or name another torch: PEERS_TORCH=torch==2.13.0+cpu.

set -euo pipefail
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/_venv.sh
source "$TOOLS/_venv.sh"
ensure_venv

PEERS=$TOOLS/.venv-peers
PACKAGES=("${PEERS_TORCH:-torch==2.13.0}" transformers==4.57.6 peft==0.21.2 optimum==2.1.0
    optimum-onnx==0.1.0 onnx==1.23.2 onnxruntime==1.32.0)
if [ "$(cat "$PEERS/.packages" 2>/dev/null || true)" != "${PACKAGES[*]}" ]; then
    echo "Installing ${PACKAGES[*]} into tools/.venv-peers …" >&2
    "$VENV/bin/python" -m venv --clear "$PEERS"
    "$PEERS/bin/python" -m pip install --quiet --disable-pip-version-check "${PACKAGES[@]}"
    echo "${PACKAGES[*]}" >"$PEERS/.packages"
fi

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export MKL_DEBUG_CPU_TYPE=5 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
if [ $# -ge 1 ]; then
    ln -s "$(cd "$1" && pwd)" "$WORK/base"
else
    "$VENV/bin/python" "$ROOT/models/tiny-llama/make.py" "$WORK/base" >&2
fi
"$PEERS/bin/python" "$TOOLS/check_peers.py" make "$WORK"

DEPLOY=("$VENV/bin/python" -m peft_deploy)
PROMPTS=(--prompt "The capital of France is" --prompt "Once upon a time" --prompt "2 + 2 =")
run() { # NAME, options of export, --, options of generate
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    echo "Exporting $name …" >&2
    "${DEPLOY[@]}" export --base "$WORK/base" --output "$WORK/$name" "${options[@]}" 2>"$WORK/log" ||
        { cat "$WORK/log" >&2; exit 1; }
    "${DEPLOY[@]}" generate "$WORK/$name" "${PROMPTS[@]}" --max-new-tokens 16 --json "$@" \
        >"$WORK/$name.json"
}
run bundle --no-validate --
run merged --adapter "tuned=$WORK/lora" --merge --
run prefixed --adapter "poet=$WORK/prefix" --prefix-slots -- --prefix poet
"$PEERS/bin/python" "$TOOLS/check_peers.py" compare "$WORK" 2>/dev/null
