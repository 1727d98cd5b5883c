#!/bin/sh
# mamba.exe under wine, beside the native program: texts, paths in UTF-8, files that are replaced.
#   sh tests/test_windows.sh ./mamba mamba.exe
set -u
native=$1 exe=$2
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
wine=$(command -v wine64 || command -v wine || echo /usr/lib/wine/wine64)
export WINEDEBUG=-all WINEPREFIX="${WINEPREFIX:-$work/wine}"
passed=0 failed=0

check() { # check NAME STATUS: counts a check; STATUS is 0 if it is good
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
        printf "ok   %s\n" "$1"
    else
        failed=$((failed + 1))
        printf "FAIL %s\n" "$1"
        cat "$work/err"
    fi
}
run() { timeout 120 "$wine" "$exe" "$@" 2> "$work/err" < /dev/null; }
same() { cmp "$work/want" "$work/got" > /dev/null 2>&1; }
refused() { # refused TEXT ARGUMENTS: status 1, and the text in the sentence
    text=$1
    shift
    run "$@" > "$work/got"
    [ $? -eq 1 ] && grep -q -- "$text" "$work/err"
}

run --version > "$work/got"
check "starts" $?

"$native" models/story.bin "Once upon a time" -t 0 -n 200 > "$work/want" 2> "$work/err"
for level in base avx2 avx512; do
    case $level in
    avx*) grep -q " $level" /proc/cpuinfo || continue ;; # avx512 is avx512f there
    esac
    run --cpu-level $level models/story.bin "Once upon a time" -t 0 -n 200 > "$work/got"
    same
    check "the greedy story, $level" $?
done

"$native" models/story.bin "Grüße, 世界 🐍" -n 1 -t 0 > "$work/want" 2> "$work/err"
run models/story.bin "Grüße, 世界 🐍" -n 1 -t 0 > "$work/got"
same && grep -q "世界 🐍" "$work/got"
check "arguments beyond ASCII" $?

mkdir "$work/Märchen 世界"
model="$work/Märchen 世界/größe.bin"
cp tests/plain.bin "$model"
run info "$model" > "$work/got"
check "a path beyond ASCII is read" $?
rm -f "$work/want"
"$native" quantize tests/plain.bin "$work/want" q8 > /dev/null 2>&1
run quantize "$model" "$work/Märchen 世界/q8.bin" q8 > /dev/null
cmp -s "$work/want" "$work/Märchen 世界/q8.bin"
check "a path beyond ASCII is written" $?
cp tests/odd.bin "$work/q8.bin"
run quantize "$model" "$work/q8.bin" q8 > /dev/null
cmp -s "$work/want" "$work/q8.bin"
check "an older file is replaced" $?

cp tests/plain.bin "$work/a.bin"
exe=$(cd "$(dirname "$exe")" && pwd)/$(basename "$exe")
here=$PWD
cd "$work" || exit 1
for name in ./a.bin A.BIN "$work/a.bin" '.\a.bin' ../"$(basename "$work")"/a.bin; do
    refused "choose another name" quantize a.bin "$name" q8
    check "a model is not written over itself: $name" $?
done
refused "not a regular file" quantize a.bin NUL q8
check "NUL is not replaced" $?
refused "cannot write" quantize a.bin no/such/folder.bin q8
check "a folder that is not there" $?
cmp -s a.bin "$here/tests/plain.bin"
check "the model is as it was" $?
# Writing fails: the target is a folder, or a file that may only be read.
mkdir folder
refused "cannot write" quantize a.bin folder q8
check "a folder is not replaced" $?
[ -z "$(find . -name '*.tmp')" ]
check "no temporary is left" $?

run a.bin Once -n 5 -s 1 --save-state s.state > /dev/null &&
    run a.bin --load-state s.state "" -n 5 --save-state s.state > /dev/null
check "a state is replaced by one that continues it" $?
# A file of 3 GB, most of it a hole: its length is read right, and it is refused for its length.
cp a.bin long.bin && truncate -s 3G long.bin
refused "3221225472" info long.bin || grep -q "bytes" err
check "a file over 2 GB" $?
cd "$here" || exit 1

run train -o "$work/t.bin" --data README.md --steps 3 --batch 2 --length 32 --d-model 32 \
    --layers 1 -s 1 > /dev/null && [ -s "$work/t.bin" ] && [ -s "$work/t.csv" -o -s "$work/t.bin.csv" ]
check "training" $?
run models/tales.bin Once -n 20 -t 0 -T 4 > "$work/got"
"$native" models/tales.bin Once -n 20 -t 0 > "$work/want" 2> /dev/null
same
check "four threads" $?

echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
