# Sourced by the other scripts: a virtual environment with pinned versions, made once.
# usage: prepare_venv FOLDER CONSTRAINTS PIP_ARGUMENT...
prepare_venv() {
    local venv="$1" constraints="$2"
    shift 2
    local wanted
    wanted="$(cat pyproject.toml "$constraints" | cksum) $*"
    if [ "$(cat "$venv/.prepared" 2>/dev/null)" != "$wanted" ]; then
        echo "setting up $venv (a few minutes the first time)" >&2
        "${PYTHON:-python3}" -m venv --clear "$venv"
        # the warning that would be shown is setuptools' general one about editable installs
        PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" "$@"
        echo "$wanted" > "$venv/.prepared"
    fi
}
