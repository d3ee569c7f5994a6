#!/usr/bin/env bash
# Install everything that `make round` needs on a fresh machine, and with the argument `testbed` what the Slurm tests need too: system packages
# (with apt as root; else it prints the command to run) and .venv with the versions of constraints.txt. If nothing is missing it ends after
# some milliseconds, so that every target can begin with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=()
need() { # need PROGRAM PACKAGE
    PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || packages+=("$2")
}
need mksquashfs squashfs-tools
need squashfuse squashfuse
need fuse-overlayfs fuse-overlayfs
need bwrap bubblewrap
[ -x .venv/bin/python ] || python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
if [ "${1:-}" = testbed ] && [ "$(id -u)" = 0 ]; then # only root can have a testbed; without root the Slurm tests are skipped
    need slurmctld slurm-wlm
    need slurmdbd slurmdbd
    need munged munge
    need mariadbd mariadb-server
    need chromium chromium # the browser tests are skipped without it
fi
if [ ${#packages[@]} -gt 0 ]; then
    install="apt-get install -y --no-install-recommends ${packages[*]}"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "system packages are missing. Run:  sudo $install" >&2
        exit 2
    fi
    echo "setup: $install" >&2
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive $install >/dev/null
fi

wanted=$(cat constraints.txt setup.cfg | sha256sum)
[ "$(cat .venv/.ready 2>/dev/null)" = "$wanted" ] && exit 0
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "python3 must be Python 3.11 or newer, but it is $(python3 --version). Install one, and put it first in PATH" >&2
    exit 2
fi
exec 9>.setup.lock # two `make` at once, perhaps on two login nodes, must not install into one .venv
flock 9 || echo "setup: this file system has no locks, so run only one \`make\` here until it has ended" >&2
[ "$(cat .venv/.ready 2>/dev/null)" = "$wanted" ] && exit 0
echo "setup: installing torch into .venv, which takes one to two minutes the first time" >&2
[ -x .venv/bin/pip ] || python3 -m venv .venv
# torch is installed first and alone: with the others, pip may choose a newer torch and download CUDA too.
.venv/bin/pip install -qq --constraint constraints.txt torch
echo "setup: installing the other packages of constraints.txt" >&2
.venv/bin/pip install -qq --constraint constraints.txt '.[dev]'
echo "$wanted" >.venv/.ready.part
mv .venv/.ready.part .venv/.ready
