#!/usr/bin/env bash
# Everything that has to hold before a change goes in: ruff, mypy, pytest.
#
#   bash tools/test.sh                      all tests that need no GPU
#   bash tools/test.sh -m 'not slow'        what follows goes to pytest
#
# Needs Python 3.10 to 3.12 and pip, nothing else. The tests marked "slow" make the real model
# with its recipe when it is not there.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
. tools/_venv.sh
ensure_venv || exit 1
set -e
step() {
    echo "$ $*"
    "$@"
}
step "$VENV/bin/ruff" check .
step "$VENV/bin/ruff" format --check .
step "$VENV/bin/mypy"
# All of them: one process a core, the tests of a file together, as they share what they make.
[ "$#" -gt 0 ] || set -- -m "not gpu" -n auto --dist loadfile
step "$VENV/bin/python" -m pytest "$@"
