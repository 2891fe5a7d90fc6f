#!/bin/sh
# Makes the virtual environment $VENV with $PYTHON and installs diffalign into it, editable, with the developers'
# tools. pip's whole output goes to $VENV/install.log; the terminal sees what is going on. Called by the Makefile.
set -eu

python=${PYTHON:-python3}
venv=${VENV:-.venv}

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    fail "'$python' was not found; install Python 3.11 or newer, or name one: make install PYTHON=python3.12"
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    fail "'$python' does not run; name a Python 3.11 or newer: make install PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is Python $found, diffalign needs 3.11 or newer; name another: make install PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; on Debian and Ubuntu: apt install python$found-venv"

printf '[1/2] virtual environment in %s with Python %s\n' "$venv" "$found"
"$python" -m venv "$venv"

printf '[2/2] installing diffalign and its dependencies (once; several minutes, PyTorch is large)\n'
log=$venv/install.log
status=$venv/install.status
terminal=no
if [ -t 1 ]; then terminal=yes; fi

# The exit status of pip travels through a file, because a pipe in sh forgets it.
{
    code=0
    PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$venv/bin/python" -m pip install --progress-bar off --editable '.[dev]' 2>&1 || code=$?
    echo "$code" >"$status"
} | {
    count=0
    while IFS= read -r line; do
        printf '%s\n' "$line" >&3
        case $line in
        *Downloading*MB\)* | *"Using cached"* | *Downloading*.whl* | Collecting*) count=$((count + 1)) ;;
        Installing*) line='unpacking and compiling; the last step' ;;
        *) continue ;;
        esac
        case $line in
        *Downloading*\([0-9][0-9][0-9]*MB\)* | unpacking*)
            if [ $terminal = yes ]; then printf '\r\033[K'; fi
            printf '      %.100s\n' "${line#"${line%%[! ]*}"}"
            ;;
        *)
            if [ $terminal = yes ]; then printf '\r\033[K      %s: %.60s' "$count" "${line#"${line%%[! ]*}"}"; fi
            ;;
        esac
    done
    if [ $terminal = yes ]; then printf '\r\033[K'; fi
} 3>"$log"

code=$(cat "$status")
rm -f "$status"
if [ "$code" != 0 ]; then
    tail -n 20 "$log" >&2
    fail "pip failed; its whole output is in $log. Run make install again once the cause is mended"
fi
printf 'installed; the command is %s/bin/diffalign\n' "$venv"
