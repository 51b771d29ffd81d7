# Makes .venv at the root of the repository, unless it is there and up to date.
# Sourced by the scripts beside it, which then use "$VENV/bin/python".
#
# The packages come from requirements.lock through pip as the user has configured it. A stamp in
# .venv holds the hash of the lock and of pyproject.toml, so that a second run starts at once.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/.peft-deploy-stamp
LOG=$ROOT/.venv-install.log

_find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.10, 3.11 or 3.12 is needed; set PYTHON to the one to use" >&2
    return 1
}

_wanted_stamp() {
    cat "$ROOT/requirements.lock" "$ROOT/pyproject.toml" | cksum
}

# One line that is rewritten while pip works; two lines where there is no terminal.
_show_progress() {
    local pid=$1 total=$2 start=$SECONDS done=0 what
    [ -t 2 ] || echo "Installing $total packages into .venv (about 3 minutes) …" >&2
    while kill -0 "$pid" 2>/dev/null; do
        done=$(grep -c '^Collecting ' "$LOG" 2>/dev/null)
        what="fetched $done of $total packages"
        grep -q '^Installing collected packages' "$LOG" 2>/dev/null && what="unpacking $total packages"
        [ -t 2 ] && printf '\r\033[KInstalling into .venv: %s, %d s of about 150' \
            "$what" $((SECONDS - start)) >&2
        sleep 1
    done
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

_pip_install() {
    # The lock names every package, so there is nothing to resolve. Byte code is compiled when a
    # module is first imported: most of these packages' modules never are.
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-compile --no-deps \
        -r "$ROOT/requirements.lock" &&
        "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps \
            --no-build-isolation -e "$ROOT"
}

ensure_venv() {
    local python start=$SECONDS
    if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(_wanted_stamp)" ]; then
        return 0
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        python=$(_find_python) || return 1
        if ! "$python" -m venv "$VENV" >"$LOG" 2>&1; then
            tail -n 20 "$LOG" >&2
            echo "error: $python -m venv failed (on Debian: apt install python3-venv)" >&2
            return 1
        fi
    fi
    rm -f "$STAMP"
    : >"$LOG"
    _pip_install >"$LOG" 2>&1 &
    PIP_PID=$!
    # Ctrl-C does not reach a background job of a script.
    trap 'kill "$PIP_PID" 2>/dev/null' EXIT
    _show_progress "$PIP_PID" "$(sed -n 's/==.*//p' "$ROOT/requirements.lock" | sort -u | wc -l)"
    if ! wait "$PIP_PID"; then
        trap - EXIT
        tail -n 20 "$LOG" >&2
        echo "error: the packages could not be installed; the whole log is in $LOG" >&2
        return 1
    fi
    trap - EXIT
    _wanted_stamp >"$STAMP"
    rm -f "$LOG"
    echo "Installed into .venv in $((SECONDS - start)) s" >&2
}
