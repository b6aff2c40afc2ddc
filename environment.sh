#!/usr/bin/env bash
# Make .venv with ptq4sam and the extras named as arguments (onnx, test, dev; none: the library).
#   ./environment.sh [EXTRA ...]
# Run again, it only adds what is missing; nothing is done when nothing has changed.
# PYTHON=... chooses the interpreter (3.10 or newer), VENV=... the folder.
set -euo pipefail
cd "$(dirname "$0")"

venv=${VENV:-.venv}

fail() {
    echo "environment.sh: $*" >&2
    exit 1
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

find_python() {
    local candidates=(python3 python3.12 python3.11 python3.10) candidate
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.10 or newer is needed, found $("${candidates[0]}" --version 2>&1 | head -n 1);" \
        "install one, or name it: PYTHON=/path/to/python3 ./environment.sh"
}

make_venv() {
    local python
    python=$(find_python)
    rm -rf "$venv"
    if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
        "$python" -m venv "$venv"
    else  # Debian without python3-venv: the interpreter's own pip fills the environment
        "$python" -m pip --version >/dev/null 2>&1 ||
            fail "$python has neither ensurepip nor pip; install python3-venv or python3-pip"
        "$python" -m venv --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install --quiet pip
    fi
}

for extra in "$@"; do
    grep -qE "^$extra = \[" pyproject.toml ||
        fail "no extra '$extra'; there are: $(sed -nE '/optional-dependencies/,/^\[project.scripts/ s/^([a-z0-9]+) = \[.*/\1/p' pyproject.toml | paste -sd ' ' -)"
done

# One stamp for each installed extra, holding the checksum of what decides about the versions.
checksum=$(cat pyproject.toml constraints.txt environment.sh | cksum)
missing=()
for extra in library "$@"; do
    [[ $(cat "$venv/stamp-$extra" 2>/dev/null) == "$checksum" ]] || missing+=("$extra")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

"$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
echo "environment.sh: installing ${missing[*]} into $venv (the first time about 7 GB with CUDA's libraries, some minutes)"
extras=$(IFS=,; echo "$*")
"$venv/bin/python" -m pip install --constraint constraints.txt --editable ".${extras:+[$extras]}"
for extra in library "$@"; do
    echo "$checksum" >"$venv/stamp-$extra"
done
