# Sourced by demo.sh and test.sh: a virtual environment with the pinned versions, made once.
# usage: prepare_venv FOLDER PIP_ARGUMENT...
prepare_venv() {
    local venv="$1"
    shift
    local wanted
    wanted="$(cat pyproject.toml constraints.txt | cksum) $*"
    if [ "$(cat "$venv/.prepared" 2>/dev/null)" != "$wanted" ]; then
        echo "setting up $venv (a few minutes the first time)" >&2
        "${PYTHON:-python3}" -m venv --clear "$venv"
        # the warning that would be shown is setuptools' general one about editable installs
        PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
        echo "$wanted" > "$venv/.prepared"
    fi
}
