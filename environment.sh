#!/usr/bin/env bash
# Make .venv with ptq4sam and the extras named as arguments (those of pyproject.toml; none: the library).
#   ./environment.sh [EXTRA ...]
# Run again, it only adds what is missing; nothing is done when nothing has changed. With the extra test, as
# root on Debian, Chromium is installed too, in which the tests of reports click.
# PYTHON=... chooses the interpreter (3.10 or newer), VENV=... the folder. The extra mmdet compiles
# mmcv's operators (10 to 20 minutes on two cores, once for each torch and Python; MAX_JOBS=... sets
# how many files at once) and keeps the result in ${XDG_CACHE_HOME:-~/.cache}/ptq4sam/wheels.
set -euo pipefail
cd "$(dirname "$0")"

venv=${VENV:-.venv}
mmcv=$(sed -nE 's/^mmcv==([0-9.]+).*/\1/p' constraints.txt)

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

has_extra() {
    grep -qE "^$1 = \[" pyproject.toml
}

pip_install() {
    "$venv/bin/python" -m pip install --constraint constraints.txt "$@"
}

# mmcv's operators belong to one torch, Python and machine, which the name of their wheel does not
# say: pip's own cache would hand out those of another. So each has a folder of its own here.
install_mmcv() {
    local bin key cache wheel building
    bin=$(cd "$venv/bin" && pwd)
    pip_install --quiet ninja "setuptools<81"
    key=$("$bin/python" -c '
import sys, sysconfig, torch
print("torch-" + torch.__version__, sys.implementation.cache_tag, sysconfig.get_platform(),
      "cuda" if torch.cuda.is_available() else "cpu", sep="-")')
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/ptq4sam/wheels/$key
    wheel=$(compgen -G "$cache/mmcv-$mmcv-*.whl" | head -n 1 || true)
    if [[ -z $wheel ]]; then
        command -v "${CXX:-c++}" >/dev/null || fail "mmcv's operators need a C++ compiler: install g++"
        [[ $key != *-cuda ]] || command -v nvcc >/dev/null || [[ -n ${CUDA_HOME:-} ]] ||
            fail "mmcv's operators for a GPU need nvcc: install the CUDA toolkit of torch's version," \
                "or compile them for the CPU: CUDA_VISIBLE_DEVICES= ./environment.sh $*"
        echo "environment.sh: compiling mmcv's operators, some 10 minutes; they are kept in $cache"
        mkdir -p "$cache"
        building=$(mktemp -d "$cache/building.XXXXXX")
        # Debugging symbols would take most of the time.
        PATH="$bin:$PATH" MMCV_WITH_OPS=1 CFLAGS="${CFLAGS:-} -g0" "$bin/python" -m pip wheel \
            --no-cache-dir --no-build-isolation --no-deps --no-binary mmcv \
            --wheel-dir "$building" "mmcv==$mmcv" ||
            { rm -rf "$building"; fail "mmcv's operators do not compile; the reason is above"; }
        wheel=$(compgen -G "$building/mmcv-*.whl")
        mv "$wheel" "$cache"
        wheel=$cache/${wheel##*/}
        rm -rf "$building"
    fi
    # By force: an mmcv of this version that is here already may be one for another torch.
    pip_install --quiet --no-deps --force-reinstall "$wheel"
}

# Tests click through reports in Chromium; where it cannot be had they are skipped with a reason.
install_chromium() {
    command -v chromium >/dev/null && command -v chromedriver >/dev/null && return
    [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null || return 0
    echo "environment.sh: installing Debian's chromium for the tests of reports"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 ||
        echo "environment.sh: chromium could not be installed; tests that need it are skipped" >&2
}

for extra in "$@"; do
    has_extra "$extra" ||
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
# Extras of earlier calls are brought up to date too: mmcv's operators, for one, break when torch
# changes under them.
for stamp in "$venv"/stamp-*; do
    extra=${stamp##*/stamp-}
    if [[ -e $stamp ]] && has_extra "$extra" && [[ " $* " != *" $extra "* ]]; then
        set -- "$@" "$extra"
    fi
done
echo "environment.sh: installing ${missing[*]} into $venv (the first time about 7 GB with CUDA's libraries, some minutes)"
if [[ " $* " == *" mmdet "* ]]; then
    pip_install --editable .  # mmcv compiles against the torch that is there
    install_mmcv "$@"
fi
[[ " $* " != *" test "* ]] || install_chromium
extras=$(IFS=,; echo "$*")
pip_install --editable ".${extras:+[$extras]}"
for extra in library "$@"; do
    echo "$checksum" >"$venv/stamp-$extra"
done
