#!/bin/sh
# mamba-dist at each level that this processor runs: the bits of a build for that level alone.
#   sh tests/test_dist.sh ./mamba-dist
set -u
dist=$1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
check() { # check NAME STATUS
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
        printf 'ok   %s\n' "$1"
    else
        failed=$((failed + 1))
        printf 'FAIL %s\n' "$1"
    fi
}
has() { # has FLAG: whether the processor does
    [ "$1" = sse2 ] || grep -qw "$1" /proc/cpuinfo
}
try() { # try LEVEL FLAG COMPILER-FLAGS
    level=$1
    has "$2" || return 0
    shift 2
    # shellcheck disable=SC2086
    ${CC:-cc} -O3 -std=gnu11 -ffp-contract=fast -fno-math-errno -fopenmp "$@" mamba.c \
        -o "$work/alone" -lm || exit 1
    for model in tests/plain.bin tests/falcon.bin models/tales.bin; do
        "$work/alone" logits $model --all --tokens 1,2,3,4,5,6,7,8,9,1,2,3 -o "$work/want" 2> /dev/null
        "$dist" --cpu-level "$level" logits $model --all --tokens 1,2,3,4,5,6,7,8,9,1,2,3 \
            -o "$work/got" 2> /dev/null
        cmp -s "$work/want" "$work/got"
        check "the bits of $* alone: $level, $model" $?
    done
    "$work/alone" models/tales.bin Once -s 3 -n 100 > "$work/want" 2> /dev/null
    "$dist" models/tales.bin --cpu-level "$level" Once -s 3 -n 100 > "$work/got" 2> /dev/null
    cmp -s "$work/want" "$work/got" && [ -s "$work/got" ]
    check "the text: $level" $?
}
try base sse2
try avx2 avx2 -mavx2 -mfma
try avx512 avx512bw -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl
# Without a wish: the best that the processor has.
cp "$work/want" "$work/best"
"$dist" models/tales.bin Once -s 3 -n 100 > "$work/got" 2> /dev/null
cmp -s "$work/best" "$work/got"
check "the best level is chosen" $?
"$dist" --cpu-level mmx models/tales.bin 2>&1 | grep -q "this program has"
check "an unknown level is refused" $?
echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
