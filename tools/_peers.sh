# Makes tools/.venv-peers, unless it is there and up to date: the libraries that bundles are held
# against, which need torch and so are no part of the product's own environment.
# Sourced by the scripts beside it, after _venv.sh and ensure_venv; they then use "$PEERS/bin/python".
#
# PyPI's torch for Linux on x86-64 brings CUDA; a CPU build is enough, so give pip the index that has
# it (PIP_EXTRA_INDEX_URL), or name another torch: PEERS_TORCH=torch==2.13.0+cpu.

PEERS=$ROOT/tools/.venv-peers
PEER_PACKAGES=("${PEERS_TORCH:-torch==2.13.0}" transformers==4.57.6 peft==0.21.2 optimum==2.1.0
    optimum-onnx==0.1.0 onnx==1.23.2 onnxruntime==1.32.0 onnxruntime-genai==0.18.0 onnx-ir==1.1.0)
# The builder of onnxruntime-genai imports models that the transformers of optimum does not have.
PEER_BUILDER_PACKAGES=(transformers==5.13.1)

ensure_peers() {
    local wanted="${PEER_PACKAGES[*]} ${PEER_BUILDER_PACKAGES[*]}"
    if [ "$(cat "$PEERS/.packages" 2>/dev/null || true)" = "$wanted" ]; then
        return 0
    fi
    echo "Installing $wanted into tools/.venv-peers …" >&2
    "$VENV/bin/python" -m venv --clear "$PEERS" &&
        "$PEERS/bin/python" -m pip install --quiet --disable-pip-version-check \
            "${PEER_PACKAGES[@]}" >&2 &&
        "$PEERS/bin/python" -m pip install --quiet --disable-pip-version-check \
            --target "$PEERS/for-builder" "${PEER_BUILDER_PACKAGES[@]}" >&2 || return 1
    echo "$wanted" >"$PEERS/.packages"
}
