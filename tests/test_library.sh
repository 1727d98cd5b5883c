#!/bin/sh
# tests/test_library.sh: libmamba.a and libmamba.so as `make lib` leaves them, with the programs of
# doc/LIBRARY.md and tests/library_threads.c. `make test-lib` runs it. CC, OPENMP, PYTHON: as in the
# Makefile. The last line is `N passed, N failed, N skipped`.
CC=${CC:-cc} PYTHON=${PYTHON:-python3}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0

check() { # check NAME [FILE]: whether the command before succeeded; FILE tells why it did not
    checked=$?
    if [ $checked -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok   $1"
    else
        failed=$((failed + 1))
        echo "FAIL $1"
        [ -z "$2" ] || sed 's/^/     /' "$2"
    fi
}
skip() { skipped=$((skipped + 1)); echo "skip $1: $2"; }
# part LANGUAGE: the first program of doc/LIBRARY.md in it
part() {
    awk -v from="\`\`\`$1" '$0 == from { on = 1; next } /^```/ { if (on) exit } on' doc/LIBRARY.md
}

# --- what is visible: names that begin with mamba_ (and the locks of OpenMP, which begin with a dot)
nm -g --defined-only libmamba.a 2> "$dir/err" | awk 'NF == 3 { print $3 }' > "$dir/a"
nm -D --defined-only libmamba.so 2>> "$dir/err" | awk 'NF == 3 { print $3 }' > "$dir/so"
[ -s "$dir/a" ] && [ -s "$dir/so" ] && ! cat "$dir/a" "$dir/so" | grep -vE '^(mamba_|\.gomp_)' \
    > "$dir/out"
check "only names with mamba_ are visible" "$dir/out"
grep -v typedef lib/mamba.h | grep -oE '\bmamba_[a-z_]+\(' | tr -d '(' | sort -u > "$dir/declared"
grep '^mamba_' "$dir/so" | sort -u | cmp - "$dir/declared" > "$dir/out" 2>&1
check "libmamba.so has what lib/mamba.h declares, and nothing else" "$dir/out"

# --- the programs of doc/LIBRARY.md write what the command line writes
./mamba models/story.bin "Once upon a time" -s 1 --no-echo > "$dir/want" 2> "$dir/err"
check "the command line" "$dir/err"
part c > "$dir/story.c"
[ "$(wc -l < "$dir/story.c")" -gt 10 ] &&
    "$CC" -std=c99 -Wall -Werror -I. "$dir/story.c" libmamba.a -lm $OPENMP -o "$dir/story" \
        2> "$dir/err" && "$dir/story" > "$dir/got" 2>> "$dir/err" && cmp "$dir/got" "$dir/want"
check "the C program of doc/LIBRARY.md, libmamba.a" "$dir/err"
"$CC" -std=c99 -Wall -Werror -I. "$dir/story.c" ./libmamba.so -o "$dir/story" 2> "$dir/err" &&
    LD_LIBRARY_PATH=. "$dir/story" > "$dir/got" 2>> "$dir/err" && cmp "$dir/got" "$dir/want"
check "the C program of doc/LIBRARY.md, libmamba.so" "$dir/err"
part python > "$dir/story.py"
[ "$(wc -l < "$dir/story.py")" -gt 10 ] && "$PYTHON" "$dir/story.py" > "$dir/got" 2> "$dir/err" &&
    cmp "$dir/got" "$dir/want"
check "the Python program of doc/LIBRARY.md" "$dir/err"

# --- and of a model whose tokens are bytes, as one that is trained on a text of one's own
./mamba tests/odd.bin "Once upon a time" -s 1 --no-echo > "$dir/want" 2> "$dir/err"
sed 's/models.story.bin/tests\/odd.bin/' "$dir/story.py" > "$dir/bytes.py"
"$PYTHON" "$dir/bytes.py" > "$dir/got" 2> "$dir/err" && cmp "$dir/got" "$dir/want" 2>> "$dir/err"
check "the Python program with a model of bytes" "$dir/err"

# --- two source files, two models in two threads, in C and in C++
strict="-Wall -Wextra -Wpedantic -Wstrict-prototypes -Werror"
"$CC" $strict -std=c99 -c tests/library_threads.c -o "$dir/one.o" 2> "$dir/err" &&
    "$CC" $strict -std=c99 -DOTHER -c tests/library_threads.c -o "$dir/two.o" 2>> "$dir/err" &&
    "$CC" "$dir/one.o" "$dir/two.o" libmamba.a -lm -lpthread $OPENMP -o "$dir/threads" \
        2>> "$dir/err" && "$dir/threads" "$dir/m.bin" > "$dir/out" 2>> "$dir/err"
check "two threads, two source files, C" "$dir/err"
grep -E '^(FAIL|[0-9]+ passed)' "$dir/out"
if command -v c++ > /dev/null; then
    cxx="c++ -x c++ -std=c++11 -Wall -Wextra -Wpedantic -Werror"
    $cxx -c tests/library_threads.c -o "$dir/one.o" 2> "$dir/err" &&
        $cxx -DOTHER -c tests/library_threads.c -o "$dir/two.o" 2>> "$dir/err" &&
        c++ "$dir/one.o" "$dir/two.o" ./libmamba.so -lpthread -o "$dir/threads" 2>> "$dir/err" &&
        LD_LIBRARY_PATH=. "$dir/threads" "$dir/m.bin" > "$dir/out" 2>> "$dir/err"
    check "two threads, two source files, C++" "$dir/err"
else skip "two threads, two source files, C++" "no c++"; fi

# --- without OpenMP and without flags that hide: no warning
for file in lib/library.c mamba.c; do
    "$CC" -O0 -Wall -Wextra -c "$file" -o "$dir/o" 2> "$dir/err" && [ ! -s "$dir/err" ]
    check "$CC -Wall -Wextra $file, without OpenMP" "$dir/err"
done

# --- make install
make -s CC="$CC" OPENMP="$OPENMP" install PREFIX=/usr DESTDIR="$dir/pkg" > "$dir/out" 2>&1 &&
    (cd "$dir/pkg/usr" && find . -type f | sort) > "$dir/out" && printf '%s\n' ./bin/mamba \
    ./include/mamba.h ./lib/libmamba.a ./lib/libmamba.so \
    ./share/bash-completion/completions/mamba ./share/man/man1/mamba.1 | cmp - "$dir/out"
check "make install DESTDIR=" "$dir/out"
make -s CC="$CC" OPENMP="$OPENMP" uninstall PREFIX=/usr DESTDIR="$dir/pkg" > "$dir/out" 2>&1 &&
    [ -z "$(find "$dir/pkg" -type f)" ]
check "make uninstall" "$dir/out"

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
