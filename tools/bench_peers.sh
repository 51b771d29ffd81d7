#!/usr/bin/env bash
# Measures bundles against other exporters' graphs of the same model (optimum, onnxruntime-genai's
# builder), and against Paddle, in one interleaved run on SmolLM2-135M:
#
#     bash tools/bench_peers.sh                        everything; about 10 minutes once all is built
#     bash tools/bench_peers.sh --only fp32 --rounds 3 --exports 0
#     bash tools/bench_peers.sh --write                and puts table and picture into README.md
#     bash tools/bench_peers.sh --json F --plot F      and keeps the raw numbers, and draws them
#     bash tools/bench_peers.sh --read F               shows a kept run
#
# Exits with 1 when a promise of ours is missed. The other libraries go into tools/.venv-peers, see
# _peers.sh; what is built lies in tools/.bench-peers until the model, a library or our code changes.

set -euo pipefail
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/_venv.sh
source "$TOOLS/_venv.sh"
ensure_venv || exit 1
# shellcheck source=tools/_peers.sh
source "$TOOLS/_peers.sh"
ensure_peers
PYTHONPATH=$ROOT exec "$VENV/bin/python" "$TOOLS/bench_peers.py" "$@"
