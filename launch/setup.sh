# shellcheck shell=bash
# Makes .venv in the project's folder and installs the project there; a second start finds it done. To be sourced:
#
#     source launch/setup.sh
#     set_up [extra ...]          # afterwards `python` is the environment's, and the folder is the project's
#
# Where torch comes from, in this order:
#   QAD_USE_SYSTEM_TORCH=1   the torch of the python that starts this
#   TORCH_INDEX_URL=...      that package index
#   without an NVIDIA GPU    a CPU build that pip finds as it is set up here, else PyTorch's CPU index if it answers
#   else                     pip's own index
# QAD_PYTHON names another python (3.11 or newer) to make the environment with.

PROJECT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH_VERSION=2.13.0

set_up() {
    cd "$PROJECT_ROOT" || return 1
    local extras wanted stamp=.venv/.qad-dist-set-up
    wanted="$PROJECT_ROOT $(cksum <pyproject.toml) system_torch=${QAD_USE_SYSTEM_TORCH:-0}"
    extras="$(extras_to_install "$stamp" "$@")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(printf '%s\n%s' "$wanted" "$extras")" ]; then
        say "the environment .venv is set up already"
    else
        rm -f "$stamp"
        make_environment && install_torch && install_project "$extras" || return 1
        printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
    fi
    export PATH="$PROJECT_ROOT/.venv/bin:$PATH" VIRTUAL_ENV="$PROJECT_ROOT/.venv"
}

say() { printf 'set-up: %s\n' "$*"; }

# What was installed before stays installed, so that demo.sh does not undo what test.sh has added.
extras_to_install() {
    local stamp=$1
    shift
    { printf '%s\n' "$@"; [ ! -f "$stamp" ] || sed -n '2p' "$stamp" | tr ',' '\n'; } | sed '/^$/d' | sort -u | paste -sd, -
}

make_environment() {
    local python options=()
    python="$(find_python)" || return 1
    [ "${QAD_USE_SYSTEM_TORCH:-0}" != 1 ] || options+=(--system-site-packages)
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' 2>/dev/null || [ ${#options[@]} -gt 0 ]; then
        say "making .venv with $python"
        "$python" -m venv ${options[@]+"${options[@]}"} .venv || return 1
    fi
}

find_python() {
    local candidate
    for candidate in ${QAD_PYTHON:+"$QAD_PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "python must be 3.11 or newer, got $(python3 --version 2>&1 || echo none); name one with QAD_PYTHON=..." >&2
    return 1
}

install_torch() {
    if .venv/bin/python -c 'import torch' 2>/dev/null; then
        say "torch $(.venv/bin/python -c 'import torch; print(torch.__version__)') is there"
    elif [ "${QAD_USE_SYSTEM_TORCH:-0}" = 1 ]; then
        echo "QAD_USE_SYSTEM_TORCH=1 needs a python with torch, got one without; name it with QAD_PYTHON=..." >&2
        return 1
    elif [ -n "${TORCH_INDEX_URL:-}" ]; then
        say "installing torch from $TORCH_INDEX_URL"
        pip_install --index-url "$TORCH_INDEX_URL" "torch>=2.10"
    elif command -v nvidia-smi >/dev/null || [ "$(uname -s)" != Linux ]; then
        say "installing torch $TORCH_VERSION"
        pip_install "torch==$TORCH_VERSION"
    elif pip_finds_cpu_torch; then
        say "installing torch $TORCH_VERSION, the CPU build that pip finds (no GPU here)"
        pip_install "torch==$TORCH_VERSION"
    elif install_torch_from_its_own_index; then
        say "installed torch $TORCH_VERSION, the CPU build of PyTorch's own index (no GPU here)"
    else
        say "installing torch $TORCH_VERSION from pip's index: no CPU build was found, this one may bring CUDA (GBs)"
        pip_install "torch==$TORCH_VERSION"
    fi
}

# pip says what it would take before anything is fetched.
pip_finds_cpu_torch() {
    .venv/bin/python -m pip install -qq --dry-run --no-deps --ignore-installed --report - "torch==$TORCH_VERSION" 2>/dev/null |
        .venv/bin/python -c '
import json, sys
wanted = json.load(sys.stdin)["install"]
sys.exit(not (len(wanted) == 1 and wanted[0]["metadata"]["version"].endswith("+cpu")))' 2>/dev/null
}

# uv knows where that is; without an answer it gives up at once.
install_torch_from_its_own_index() {
    .venv/bin/python -m pip install -qq --disable-pip-version-check uv >>.venv/set-up.log 2>&1 &&
        UV_HTTP_TIMEOUT=30 UV_HTTP_RETRIES=1 .venv/bin/uv pip install --quiet --python .venv/bin/python \
            --torch-backend=cpu "torch==$TORCH_VERSION" >>.venv/set-up.log 2>&1
}

install_project() {
    say "installing qad-dist${1:+ with $1} and what it needs (a few minutes; log in .venv/set-up.log)"
    pip_install --editable ".${1:+[$1]}" && say "done"
}

pip_install() {
    if ! .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" >>.venv/set-up.log 2>&1; then
        tail -n 20 .venv/set-up.log >&2
        echo "set-up: pip must install $*, got the error above; the whole log is .venv/set-up.log" >&2
        return 1
    fi
}
