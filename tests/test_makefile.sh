#!/bin/sh
# What the Makefile finds out about a compiler, with compilers made up for the purpose:
#   sh tests/test_makefile.sh
# A compiler here is a script around the real one (CC, or cc). It replaces its -o target before it
# writes there, as tcc and emcc do. A target that is no regular file is only noted down: run by
# root, the script would replace the device.
set -u
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
real=${CC:-cc}
passed=0 failed=0

check() { # check NAME STATUS: counts a check; STATUS is 0 if it is good
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok   $1"
    else
        failed=$((failed + 1))
        echo "FAIL $1"
    fi
}

compiler() { # compiler NAME CASE: a compiler; CASE are lines of a `case`, for its arguments in $a
    cat > "$work/$1" << END
#!/bin/sh
out= last=
n=\$#
for a in "\$@"; do
    [ "\$last" = -o ] && out=\$a
    last=\$a
done
if [ -n "\$out" ] && [ -e "\$out" ] && [ ! -f "\$out" ]; then
    echo "\$out" >> "$work/devices"
    exit 0
fi
[ -z "\$out" ] || rm -f "\$out"
while [ \$n -gt 0 ]; do
    a=\$1
    shift
    case \$a in
$2
    *) set -- "\$@" "\$a" ;;
    esac
    n=\$((n - 1))
done
exec $real "\$@"
END
    chmod +x "$work/$1"
}

# dry NAME MAKE-ARGUMENTS: the commands of `make -n`, with scratch files in a folder of their own
dry() {
    cc=$1
    shift
    mkdir -p "$work/scratch"
    TMPDIR="$work/scratch" make -n CC="$work/$cc" "$@" > "$work/out" 2> "$work/err"
}

finds() { # finds NAME TEXT: whether the dry run prints the text
    grep -qF -- "$2" "$work/out"
    check "$1" $?
}

: > "$work/devices"
compiler replacing ''
dry replacing
check "make -n with a compiler that replaces its target" $?
[ ! -s "$work/devices" ]
check "nothing is linked to a device" $?
[ -c /dev/null ]
check "/dev/null is a device" $?
[ -z "$(ls -A "$work/scratch")" ]
check "scratch files are removed" $?

compiler no_native '    -march=native | -mcpu=native) exit 1 ;;'
dry no_native
finds "a compiler without -march=native" "any (no processor-specific instructions)"

compiler no_openmp '    -fopenmp | -lomp) exit 1 ;;'
dry no_openmp
finds "a compiler without -fopenmp" "none: no OpenMP found"

compiler ignores_openmp '    -fopenmp) ;;
    -lomp) exit 1 ;;'
dry ignores_openmp
finds "a compiler that takes -fopenmp and ignores it" "none: no OpenMP found"

# A program with OpenMP that stops at once, as if the library were missing where it runs.
cat > "$work/stop.c" << 'END'
#include <stdlib.h>
__attribute__((constructor)) static void stop(void) { _Exit(127); }
END
compiler openmp_stops "    -fopenmp) set -- \"\$@\" -fopenmp \"$work/stop.c\" ;;
    -lomp) exit 1 ;;"
dry openmp_stops
finds "a compiler whose OpenMP programs do not run" "none: no OpenMP found"

# A cross compiler: no program runs here, so it is enough that OpenMP links.
if dry replacing && grep -qF -- "-fopenmp" "$work/out"; then
    compiler cross "    -o) set -- \"\$@\" \"$work/stop.c\" -o ;;"
    dry cross
    finds "OpenMP of a cross compiler" "threads      -fopenmp"
    skipped=0
else
    echo "skip OpenMP of a cross compiler: $real has no OpenMP"
    skipped=1
fi

dry replacing VL=1
finds "VL=1 is passed on" "-DVL=1"
dry replacing OPENMP= ARCH=
! grep -qE -- '-fopenmp|-march' "$work/out"
check "OPENMP= and ARCH= leave the flags out" $?

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
