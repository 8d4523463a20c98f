# Sourced by the other scripts: a virtual environment with pinned versions, made once.

# usage: quiet_pip VENV PIP_ARGUMENT...    What pip says is shown only where it fails.
quiet_pip() {
    local venv="$1" said
    shift
    said="$(mktemp)"
    if ! "$venv/bin/python" -m pip --disable-pip-version-check "$@" > "$said" 2>&1; then
        cat "$said" >&2
        rm -f "$said"
        return 1
    fi
    rm -f "$said"
}

# usage: prepare_venv FOLDER CONSTRAINTS PIP_ARGUMENT...
prepare_venv() {
    local venv="$1" constraints="$2"
    shift 2
    local wanted
    wanted="$(cat pyproject.toml "$constraints" | cksum) $*"
    if [ "$(cat "$venv/.prepared" 2>/dev/null)" != "$wanted" ]; then
        echo "setting up $venv (a few minutes the first time)" >&2
        "${PYTHON:-python3}" -m venv --clear "$venv"
        quiet_pip "$venv" install -c "$constraints" "$@"
        echo "$wanted" > "$venv/.prepared"
    fi
}
