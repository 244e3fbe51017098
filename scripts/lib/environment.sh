# Makes .venv with Fleetwire in it. Sourced by scripts that work on a fresh machine; needs only bash, python3 and git.
#
#   cd "$ROOT"; say_prefix=scripts/test
#   install_debian_packages curl:curl ...   PACKAGE:COMMAND, the command that shows that it is there
#   make_environment dev                    extras of pyproject.toml, separated by commas

readonly python_wanted="3.11"
readonly venv="$PWD/.venv"

say() { printf '%s: %s\n' "$say_prefix" "$*"; }
fail() { printf '%s: %s\n' "$say_prefix" "$*" >&2; exit 1; }

# Whether apt-get may be used: it is there, and we are root.
can_install_packages() { [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; }

# Runs a command that talks much; shows what it said only when it failed.
quietly() {
    local output
    if ! output=$("$@" </dev/null 2>&1); then
        printf '%s\n' "$output" | tail -n 40 >&2
        return 1
    fi
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    say "installing Debian packages: $*"
    quietly apt-get -q -o DPkg::Lock::Timeout=300 update \
        && quietly apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"
}

# Installs the packages whose command is missing when root; else says what is missing and why it would be wanted.
# A missing one is no failure here: what needs it says so itself.
install_debian_packages() {
    local missing=() entry package probe
    for entry in "$@"; do
        package=${entry%%:*} probe=${entry#*:}
        PATH="$PATH:/usr/sbin:/sbin:/usr/lib/systemd:/lib/systemd" command -v "$probe" >/dev/null || missing+=("$package")
    done
    [[ ${#missing[@]} == 0 ]] && return 0
    if ! can_install_packages; then
        say "not there: ${missing[*]}. What needs them is left out. To have them: apt-get install ${missing[*]} (as root)"
    elif ! apt_install "${missing[@]}"; then
        say "could not install ${missing[*]}; going on: what needs them is left out"
    fi
}

is_wanted_python() { "$1" -c "import sys; sys.exit(sys.version_info < (${python_wanted/./, }))" >/dev/null 2>&1; }

# Sets `python`: FLEETWIRE_PYTHON, or the first Python on PATH that is new enough.
find_python() {
    local candidate
    if [[ -n ${FLEETWIRE_PYTHON:-} ]]; then
        is_wanted_python "$FLEETWIRE_PYTHON" \
            || fail "FLEETWIRE_PYTHON=$FLEETWIRE_PYTHON is not a Python $python_wanted or later that runs"
        python=$FLEETWIRE_PYTHON
        return
    fi
    for candidate in python3 /usr/bin/python3 python3.{14,13,12,11}; do
        if is_wanted_python "$candidate"; then
            python=$candidate
            return
        fi
    done
    fail "needs Python $python_wanted or later; python3 here is $(python3 --version 2>/dev/null || echo missing)." \
        "Install one, or name it: FLEETWIRE_PYTHON=/path/to/python3 $say_prefix"
}

# Debian's python3 can make no environment before python3-venv is there.
install_venv_module() {
    "$python" -c "import ensurepip, venv" >/dev/null 2>&1 && return
    local package
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    can_install_packages \
        || fail "$python cannot make a virtual environment. As root: apt-get install $package"
    apt_install "$package" || fail "could not install $package, which $python needs to make a virtual environment"
}

# Whether .venv was made here, runs, and is of the Python that was asked for.
is_usable_venv() {
    is_wanted_python "$venv/bin/python" || return 1
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    # Scripts hold the path of the environment they were made in: a copied or moved one would run another tree's code.
    head -c 300 "$venv/bin/pip" 2>/dev/null | grep -qF "$venv/bin/" || return 1
    [[ -z ${FLEETWIRE_PYTHON:-} ]] || [[ $(base_of "$FLEETWIRE_PYTHON") == $(base_of "$venv/bin/python") ]]
}

base_of() { "$1" -c 'import os, sys; print(os.path.realpath(sys.base_prefix), sys.version)'; }

# Whether the install still works: our packages come from this tree, and no dependency is missing or too old.
is_usable_install() {
    local where='import os, fleetwire_shared as m; print(os.path.realpath(os.path.dirname(os.path.dirname(m.__file__))))'
    [[ $(cd / && "$venv/bin/python" -c "$where" 2>/dev/null) == $(realpath "$PWD/shared") ]] \
        && "$venv/bin/python" -m pip check >/dev/null 2>&1
}

# Usage: make_environment EXTRAS. What was installed is noted within .venv, so that a second run skips it.
make_environment() {
    local extras=$1 wanted
    if ! is_usable_venv; then
        find_python
        install_venv_module
        [[ ! -e $venv && ! -L $venv ]] || say "rebuilding .venv: it is broken, or was made elsewhere"
        rm -rf -- "$venv"
        say "making .venv with $("$python" --version)"
        quietly "$python" -m venv "$venv" || fail "could not make .venv"
    fi
    wanted=$(sha256sum <pyproject.toml)
    if { [[ $(cat "$venv/installed-$extras" 2>/dev/null) == "$wanted" ]] \
        || [[ $(cat "$venv/installed-dev" 2>/dev/null) == "$wanted" ]]; } && is_usable_install; then
        say "using .venv: pyproject.toml is unchanged since it was installed"
        return
    fi
    say "installing fleetwire[$extras] into .venv; this takes a minute or two"
    rm -f -- "$venv"/installed-*
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -e ".[$extras]" \
        || fail "could not install fleetwire[$extras]"
    printf '%s\n' "$wanted" >"$venv/installed-$extras"
}
