#!/bin/sh
# What the command line does with a GPU, tested without one: a backend that computes on the
# processor (tests/gpu_stub.c) must give what the processor gives.
#   sh tests/test_gpu_stub.sh ./mamba [CC]
mamba=$1
cc=${2:-cc}
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
$cc -std=gnu11 -O2 -Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas -I. tests/gpu_stub.c \
    -o "$dir/stub" -lm || exit 1

# same GROUPS NAME ARGUMENTS: equal output, numbers but for their last digits; so many groups of
# several texts were read
same() {
    groups=$1 name=$2
    shift 2
    "$dir/stub" "$@" > "$dir/gpu" 2> "$dir/gpu.err" &&
        "$mamba" "$@" --cpu > "$dir/cpu" 2> "$dir/cpu.err" &&
        awk -v gpu="$dir/gpu" '
            { if ((getline other < gpu) <= 0) exit 1
              n = split($0, a); m = split(other, b)
              if (/^length/) { n -= 2; m -= 2 } # the time
              if (n != m) exit 1
              for (i = 1; i <= n; i++) {
                  d = a[i] - b[i]
                  number = a[i] + 0 == a[i]
                  if (a[i] != b[i] && !(number && d * d <= 1e-8 * (1 + a[i] * a[i]))) exit 1
              } }
            END { if ((getline other < gpu) > 0) exit 1 }' "$dir/cpu" &&
        [ -s "$dir/cpu" ] && grep -q "^stub: $groups groups" "$dir/gpu.err"
    if [ $? = 0 ]; then
        passed=$((passed + 1))
        echo "ok   $name"
    else
        failed=$((failed + 1))
        echo "FAIL $name: $(tail -n 1 "$dir/gpu.err") $(tail -n 1 "$dir/cpu.err")"
    fi
}

model=models/tales.bin
head -c 3000 README.md > "$dir/text"
printf 'Once <|endoftext|>upon<|endoftext|>a time there was<|endoftext|>The king.' > "$dir/doc"
printf 'Once upon\nThe king said that he was old and\n\nA\nOne day a bird flew off\nHe\n' \
    > "$dir/prompts"
: > "$dir/many"
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    for word in Once The A King On Then One Old She He It They; do
        echo "$word $word upon a $i" >> "$dir/many"
    done
done
same 1 "eval of a text" eval $model "$dir/text"
same 2 "eval --context" eval $model "$dir/text" --context 100
same 2 "eval --context --each" eval $model "$dir/text" --context 77 --each
same 1 "eval --split eot" eval $model "$dir/doc" --split eot
same 1 "eval --split eot --each" eval $model "$dir/doc" --split eot --each
same 4 "eval --task induction" eval models/induction.bin --task induction --length 64 --samples 50
same 4 "eval --task copying --recurrent" \
    eval models/copying.bin --task copying --length 300 --samples 11 --recurrent
same 3 "eval --task, longer than fits" \
    eval models/copying.bin --task copying --length 1500 --samples 3
same 1 "--batch" $model --batch "$dir/prompts" -n 20 -s 3
same 1 "--batch, --samples" $model --batch "$dir/prompts" -n 20 -s 3 --samples 3
same 3 "--batch, more than fit at once" $model --batch "$dir/many" -n 3 -s 3
same 0 "--samples" $model "Once upon a time" --samples 5 -n 30 -s 1
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
