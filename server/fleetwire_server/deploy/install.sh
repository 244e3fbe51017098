#!/bin/sh
# Installs the Fleetwire agent on this host, or upgrades it. As root, or as a user who may use sudo:
#
#   curl -fsSL 'SERVER/api/agents/install-script?key=KEY' | bash
#   curl -fsSL 'SERVER/api/agents/install-script?key=KEY' | bash -s -- --profile monitor
#
# Everything is one function that is called in the last line: of a download that was cut off, nothing runs.

fleetwire_usage() {
    cat <<'USAGE'
Installs the Fleetwire agent on this host, or upgrades it. Options:
  --profile manage    runs as root: commands, files, logs, metrics (default)
  --profile monitor   runs as an unprivileged user in a sandbox: metrics, logs and files that user may read
  --dry-run           say what would be done, and change nothing
  --no-wait           do not wait until the server has seen the agent
  --replace           take over a host that has another agent's key
  --uninstall         remove the agent; keeps its key and settings in /etc/fleetwire
  --uninstall --purge remove those, too
USAGE
}

fleetwire_say() { printf 'fleetwire: %s\n' "$*"; }
fleetwire_fail() { printf 'fleetwire: %s\n' "$*" >&2; exit 1; }

# Whether this Python is new enough and whole: Debian's python3-minimal, say, lacks asyncio.
fleetwire_is_usable_python() {
    fleetwire_is_new_python "$1" && "$1" -I -c 'import @PYTHON_MODULES@' >/dev/null 2>&1
}

# -I, here and below: else Python would import what lies in the current directory, which may be anybody's.
fleetwire_is_new_python() { "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints the first usable Python. The one without a number comes first: it outlives an upgrade of the distribution.
fleetwire_find_python() {
    for name in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11 /usr/local/bin/python3 \
        /usr/local/bin/python3.14 /usr/local/bin/python3.13 /usr/local/bin/python3.12 /usr/local/bin/python3.11; do
        path=$(command -v "$name" 2>/dev/null) || continue
        if fleetwire_is_usable_python "$path"; then
            printf '%s\n' "$path"
            return
        fi
    done
    return 1
}

# Prints the command that brings a newer Python to this distribution.
fleetwire_python_command() {
    [ -r /etc/os-release ] || return 1
    # shellcheck disable=SC1091  # of the host
    ( . /etc/os-release
    for key in "${ID:-}:${VERSION_ID:-}" $(for like in ${ID_LIKE:-}; do printf 'like:%s ' "$like"; done); do
        case $key in
@PYTHON_CASES@
        esac
    done
    exit 1 )
}

fleetwire_fail_without_python() {
    if python=$(command -v python3) && found=$("$python" --version 2>&1); then
        problem="the agent needs Python 3.11 or later; this host has $found"
        if fleetwire_is_new_python "$python"; then
            problem="$python ($found) lacks parts of the standard library"
        fi
    else
        problem="the agent needs Python 3.11 or later; this host has no python3"
    fi
    if ! command=$(fleetwire_python_command); then
        fleetwire_fail "$problem. $unknown_advice, then run this again."
    elif [ -z "$command" ]; then
        fleetwire_fail "$problem. $no_command_advice, then run this again."
    fi
    fleetwire_fail "$problem. Run this as root, then run this script again:  $command"
}

# Usage: fleetwire_fetch URL FILE. Whatever brings it, its digest is checked afterwards.
fleetwire_fetch() {
    if command -v curl >/dev/null 2>&1; then
        if [ -n "$tls_pin" ]; then
            curl -fsSk --pinnedpubkey "$tls_pin" --connect-timeout 15 --max-time 300 -o "$2" "$1"
        else
            curl -fsSL --connect-timeout 15 --max-time 300 -o "$2" "$1"
        fi
    elif command -v wget >/dev/null 2>&1; then
        # shellcheck disable=SC2086  # one option or none
        wget -q ${tls_pin:+--no-check-certificate} -T 30 -O "$2" "$1"
    else
        "$python" -I -c '
import ssl, sys, urllib.request
context = ssl._create_unverified_context() if sys.argv[3] else None
try:
    with urllib.request.urlopen(sys.argv[1], timeout=30, context=context) as answer, open(sys.argv[2], "wb") as file:
        file.write(answer.read())
except OSError as err:
    sys.exit(f"{sys.argv[1]}: {err}")' "$1" "$2" "$tls_pin"
    fi
}

fleetwire_sha256() { "$python" -I -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"; }

# Runs the agent's own installer as root: the key goes over standard input, where no process list shows it.
fleetwire_as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -- "$@"
    fi
}

fleetwire_main() {
    set -eu
    umask 077
    server=@SERVER@
    key=@KEY@
    tls_pin=@TLS_PIN@
    sha256=@SHA256@
    version=@VERSION@
    unknown_advice=@UNKNOWN_ADVICE@
    no_command_advice=@NO_COMMAND_ADVICE@

    action=install
    has_profile='' purge='' dry_run='' no_wait='' replace=''
    profile=manage
    while [ $# -gt 0 ]; do
        case $1 in
            --profile)
                [ $# -ge 2 ] || { fleetwire_usage >&2; exit 2; }
                profile=$2 has_profile=1
                shift
                ;;
            --profile=*) profile=${1#--profile=} has_profile=1 ;;
            --dry-run) dry_run=--dry-run ;;
            --no-wait) no_wait=--no-wait ;;
            --replace) replace=--replace ;;
            --uninstall) action=uninstall ;;
            --purge) purge=--purge ;;
            -h | --help)
                fleetwire_usage
                exit 0
                ;;
            *)
                printf 'fleetwire: unknown option %s\n' "$1" >&2
                fleetwire_usage >&2
                exit 2
                ;;
        esac
        shift
    done
    case $profile in
        manage | monitor) ;;
        *)
            printf 'fleetwire: --profile must be manage or monitor, got %s\n' "$profile" >&2
            exit 2
            ;;
    esac
    if [ -n "$purge" ] && [ $action != uninstall ]; then
        printf 'fleetwire: --purge goes with --uninstall\n' >&2
        exit 2
    fi
    [ "$(uname -s)" = Linux ] || fleetwire_fail "the agent runs on Linux; this is $(uname -s)"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null 2>&1 || fleetwire_fail "run this as root: it is not, and there is no sudo"
    fi

    python=$(fleetwire_find_python) || fleetwire_fail_without_python

    directory=$(mktemp -d "${TMPDIR:-/tmp}/fleetwire-install.XXXXXX")
    # shellcheck disable=SC2064  # of now: the trap may run where the variable is gone
    trap "rm -rf -- '$directory'" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    bundle=$directory/fleetwire-agent.pyz
    fleetwire_say "fetching the agent $version from $server"
    fleetwire_fetch "$server/api/agents/bundle" "$bundle" \
        || fleetwire_fail "the agent could not be fetched from $server/api/agents/bundle; see above"
    [ "$(fleetwire_sha256 "$bundle")" = "$sha256" ] \
        || fleetwire_fail "what came from $server is not the agent this script was made for (its SHA-256 differs);" \
            "fetch the script again"

    status=0
    if [ $action = uninstall ]; then
        # shellcheck disable=SC2086  # each one option or none
        fleetwire_as_root "$python" -I "$bundle" uninstall $purge $dry_run || status=$?
    else
        # shellcheck disable=SC2086
        printf '%s\n' "$key" | fleetwire_as_root "$python" -I "$bundle" install --server "$server" --key-file - \
            ${has_profile:+--profile "$profile"} ${tls_pin:+--tls-pin "$tls_pin"} --python "$python" \
            $dry_run $no_wait $replace || status=$?
    fi
    exit $status
}

{ fleetwire_main "$@"; }
