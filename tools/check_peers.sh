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
# The libraries go into tools/.venv-peers; _peers.sh says which, and how to choose the torch.

set -euo pipefail
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/_venv.sh
source "$TOOLS/_venv.sh"
ensure_venv || exit 1
# shellcheck source=tools/_peers.sh
source "$TOOLS/_peers.sh"
ensure_peers

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
