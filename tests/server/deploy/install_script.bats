# The install script as a host's shell sees it. Run by test_install_script.py, which renders the script:
#   SCRIPT    the rendered script
#   SHELLS    the shells to try, such as "dash bash"

setup() {
    cd "$BATS_TEST_TMPDIR"
    bin=$BATS_TEST_TMPDIR/bin
    mkdir "$bin"
}

# Puts commands of this machine into a PATH that has nothing else.
only() { for name in "$@"; do ln -sf "$(command -v "$name")" "$bin/$name"; done; }

# Puts a command there that notes that it was run.
tell_tale() {
    for name in "$@"; do
        printf '#!/bin/sh\necho "%s $*" >>"%s"\n' "$name" "$BATS_TEST_TMPDIR/ran" >"$bin/$name"
        chmod +x "$bin/$name"
    done
}

# Usage: on_a_host OS_RELEASE PYTHON3 COMMAND...  With that os-release and that file as /usr/bin/python3, which is tried
# first wherever PATH leads; seen by nobody else.
on_a_host() {
    printf '%b' "$1" >os-release
    unshare --mount sh -c '
        mount --bind os-release "$(readlink -f /etc/os-release)"
        [ ! -e /usr/bin/python3 ] || mount --bind "$1" "$(readlink -f /usr/bin/python3)"
        shift
        exec "$@"' sh "${@:2}"
}

@test "a script that was cut off anywhere runs nothing" {
    tell_tale curl wget python3 python3.11 python3.12 python3.13 python3.14 sudo mktemp rm id uname cat
    size=$(stat -c %s "$SCRIPT")
    for shell in $SHELLS; do
        path=$(command -v "$shell")
        for length in $(seq 0 97 "$size") $(seq $((size - 60)) $((size - 3))); do
            head -c "$length" "$SCRIPT" | PATH=$bin "$path" -s -- --profile monitor >/dev/null 2>&1 || true
            [ ! -e ran ] || { echo "$shell, $length of $size bytes: $(cat ran)"; false; }
        done
        PATH=$bin "$path" -s <"$SCRIPT" >/dev/null 2>&1 || true
        [ -e ran ]   # whole, it does run: the tell-tales work
        rm ran
    done
}

@test "wrong options are refused with the right ones, and nothing is done" {
    only uname id cat
    for shell in $SHELLS; do
        for arguments in "--profil manage" "--profile" "--profile admin" "--purge" "install"; do
            # shellcheck disable=SC2086
            run env PATH="$bin" "$(command -v "$shell")" "$SCRIPT" $arguments
            [ "$status" -eq 2 ]
            [[ $output == *"--profile"* || $output == *"--uninstall"* ]]
        done
        run env PATH="$bin" "$(command -v "$shell")" "$SCRIPT" --help
        [ "$status" -eq 0 ]
        [[ $output == *"--uninstall --purge"* ]]
    done
}

@test "a host without python3 is told the command of its distribution" {
    only uname id cat
    for shell in $SHELLS; do
        run on_a_host 'ID=debian\nVERSION_ID="12"\n' /dev/null env PATH="$bin" "$(command -v "$shell")" "$SCRIPT"
        [ "$status" -eq 1 ]
        [[ $output == *"this host has no python3"* ]]
        [[ $output == *"apt-get update && apt-get install -y python3" ]]
    done
}

@test "a host whose python3 is too old, or not whole, is told so" {
    only uname id cat
    printf '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit\nexit 1\n' >"$bin/python3"
    chmod +x "$bin/python3"
    for shell in $SHELLS; do
        run on_a_host 'ID=alpine\nVERSION_ID=3.20\n' "$bin/python3" env PATH="$bin" "$(command -v "$shell")" "$SCRIPT"
        [ "$status" -eq 1 ]
        [[ $output == *"this host has Python 3.9.2. "* ]]
        [[ $output == *"apk add python3" ]]
        run on_a_host 'ID=debian\nVERSION_ID="11"\n' "$bin/python3" env PATH="$bin" "$(command -v "$shell")" "$SCRIPT"
        [ "$status" -eq 1 ]
        [[ $output == *"packages no Python 3.11 or later"* ]]
    done
}
