#!/usr/bin/env bash
# Sets up .venv, one step a call; the Makefile calls it and remembers which steps are done.
#   setup_env.sh requirements   the virtual environment and the pinned packages, torch first
#   setup_env.sh extension      csrc/ compiled, deltatc installed in place
#   setup_env.sh pull FOLDER    data or models, from the DVC remote inside the repository
# A step that fails ends with one sentence; all that its tool said is then in .venv/setup.log.
set -uo pipefail
trap 'exit 130' INT # or the interrupted tool would be reported as a failed one

PYTHON=${PYTHON:-python3}
NEEDED_KB=3000000 # .venv with a CPU build of torch takes 2 GB

main() {
    cd "$(dirname "$0")/.." || exit
    case $1 in
        requirements) check_machine && make_venv && install_requirements ;;
        extension) check_compiler && build_extension ;;
        pull) pull "$2" ;;
    esac
}

check_machine() {
    command -v git >/dev/null || stop "git is not on the PATH; install it (Debian: apt-get install git)"
    git rev-parse --git-dir >/dev/null 2>&1 ||
        stop "this folder is not a git repository, which DVC needs; use a git clone, or run git init here"
    check_compiler

    local free used
    free=$(df -Pk . | awk 'NR == 2 {print $4}')
    used=$(du -sk .venv 2>/dev/null | cut -f1)
    ((free + ${used:-0} >= NEEDED_KB)) ||
        stop "the set-up needs $((NEEDED_KB / 1000)) MB here and $((free / 1000)) MB are free; free some space"
}

check_compiler() {
    command -v g++ >/dev/null || stop "g++ is not on the PATH; install a C++17 compiler (Debian: apt-get install g++)"
}

make_venv() {
    [ "$(cat .venv/.folder 2>/dev/null)" = "$(pwd -P)" ] && .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    check_python
    say "making .venv with $("$PYTHON" --version)"
    attempt "making .venv" "$PYTHON" -m venv --clear .venv
    pwd -P >.venv/.folder
}

check_python() {
    local version
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        stop "$PYTHON cannot be run; install Python 3.10, 3.11 or 3.12, or name one: make PYTHON=python3.11 repro"
    case $version in
        3.10 | 3.11 | 3.12) ;;
        *) stop "$PYTHON is Python $version, and 3.10, 3.11 or 3.12 is needed; name one: make PYTHON=python3.11 repro" ;;
    esac
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$PYTHON cannot make virtual environments; install its venv module (Debian: apt-get install python3-venv)"
    "$PYTHON" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
        stop "the headers of $PYTHON (Python.h) are missing; install them (Debian: apt-get install python3-dev)"
}

install_requirements() {
    # pip writes INSTALLER near the end: a package without it was interrupted, though pip would count it as installed.
    local info
    for info in .venv/lib/python3*/site-packages/*.dist-info; do
        [ -e "$info/INSTALLER" ] || rm -rf "$info"
    done
    say "installing torch (the largest package; minutes where the index serves a CUDA build)"
    attempt "installing torch" pip_install "$(grep '^torch==' requirements.txt)"
    say "installing the other requirements (about a minute)"
    attempt "installing requirements.txt" pip_install -r requirements.txt
}

build_extension() {
    say "building the extension"
    # The compiler's environment is .venv itself: an isolated build would download torch a second time.
    attempt "building the extension" pip_install --no-build-isolation --no-deps -e .
}

pull() {
    say "pulling $1/ from the remote inside the repository"
    attempt "dvc pull $1.dvc" .venv/bin/python -m dvc pull --remote embedded "$1.dvc"
}

pip_install() {
    PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$@"
}

# attempt WHAT COMMAND...: run the command quietly; when it fails, stop with the reason.
attempt() {
    local what=$1 output reason
    shift
    output=$("$@" 2>&1 </dev/null) && return
    case $output in
        *"No space left on device"* | *"Disk quota exceeded"*)
            stop "$what: the disk is full; free some space here and under ${TMPDIR:-/tmp}, and run make again" ;;
        *"after connection broken by"* | *"Read timed out"*)
            stop "$what: the package index cannot be reached; check the network and the proxy settings, and run make again" ;;
        *"unsaved files"*)
            stop "$what: the folder was edited; keep that with .venv/bin/dvc commit, or drop it with .venv/bin/dvc checkout --force" ;;
        *"failed to pull data from the cloud"*)
            stop "$what: .dvc/embedded does not hold all of its files; take a complete clone and run make again" ;;
    esac
    mkdir -p .venv && printf '%s\n' "$output" >.venv/setup.log
    # A compiler's own message names the line; what pip and setuptools say about it does not.
    reason=$(grep -m1 -oE 'csrc/.* error: .*' .venv/setup.log || grep -m1 -oiE '\berror: .*' .venv/setup.log)
    stop "$what failed: ${reason:-no reason was given}; see .venv/setup.log"
}

say() {
    echo "set-up: $*"
}

stop() {
    echo "set-up: error: $*" >&2
    exit 1
}

main "$@"
