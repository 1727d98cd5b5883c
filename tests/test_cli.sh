#!/bin/sh
# tests/test_cli.sh ./mamba [all]: the command line as a user meets it. stdout is text and nothing
# but text, errors name the thing and exit with 1, states go on bit for bit. The last line is
# `N passed, N failed, N skipped`.
mamba=${1:-./mamba}
everything=$2
model=models/tales.bin
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0

ok()   { passed=$((passed + 1)); echo "ok   $1"; }
bad()  { failed=$((failed + 1)); echo "FAIL $1"; [ -z "$2" ] || printf '     %s\n' "$2"; }
# check NAME [FILE]: whether the command before succeeded; FILE tells why it did not
check() {
    checked=$?
    if [ $checked -eq 0 ]; then ok "$1"; else bad "$1" "${2:+$(cat "$2")}"; fi
}
same() {
    if [ "$2" = "$3" ]; then ok "$1"
    else
        bad "$1" "got  [$2]"
        printf '     want [%s]\n' "$3"
    fi
}
same_file() { if cmp -s "$2" "$3"; then ok "$1"; else bad "$1" "$2 and $3 differ"; fi; }
skip() { skipped=$((skipped + 1)); echo "skip $1: $2"; }

# fails NAME WORD ARGUMENTS: exit status 1, WORD in the message, nothing on stdout
fails() {
    name=$1 word=$2
    shift 2
    "$mamba" "$@" > "$dir/out" 2> "$dir/err" < /dev/null
    status=$?
    if [ $status -eq 1 ] && grep -qF -- "$word" "$dir/err" && [ ! -s "$dir/out" ]; then ok "$name"
    else bad "$name" "status $status, stderr: $(cat "$dir/err")"; fi
}

prompt="Once upon a time there was a little girl who lived in the forest with her grandmother. \
One day"

# --- text
"$mamba" $model "$prompt" -t 0 -n 60 > "$dir/a" 2> "$dir/err" ||
    bad "generation" "$(cat "$dir/err")"
case $(cat "$dir/a") in
    "$prompt"*) ok "the prompt is echoed" ;;
    *) bad "the prompt is echoed" "$(cat "$dir/a")" ;;
esac
grep -q 'prefill .* tokens/s | decode 60 tokens' "$dir/err"
check "timing on stderr" "$dir/err"
"$mamba" $model "$prompt" -t 0 -n 60 --no-echo > "$dir/b" 2> /dev/null
same "--no-echo leaves the prompt out" "$prompt$(cat "$dir/b")" "$(cat "$dir/a")"
printf %s "$prompt" | "$mamba" $model - -t 0 -n 60 > "$dir/b" 2> /dev/null
same_file "prompt from stdin" "$dir/b" "$dir/a"
"$mamba" $model "$prompt" -s 7 -n 50 -T 1 > "$dir/a" 2> /dev/null
"$mamba" $model "$prompt" -s 7 -n 50 -T 2 > "$dir/b" 2> /dev/null
same_file "same seed, same text, any threads" "$dir/b" "$dir/a"
"$mamba" $model "$prompt" -s 8 -n 50 > "$dir/b" 2> /dev/null
! cmp -s "$dir/a" "$dir/b"
check "another seed, another text"
"$mamba" $model "" -s 3 -n 20 > "$dir/a" 2> /dev/null && [ -s "$dir/a" ]
check "an empty prompt starts a text"
"$mamba" $model -n 5 -t 0 -- "-5 degrees" > "$dir/a" 2> /dev/null
case $(cat "$dir/a") in
    "-5 degrees"*) ok "-- before a prompt with a dash" ;;
    *) bad "-- before a prompt with a dash" ;;
esac
same "-n 0 writes nothing" "$("$mamba" $model "Hello" -n 0 2> /dev/null)" ""
whole=$("$mamba" $model "$prompt" -t 0 -n 40 --no-echo 2> /dev/null)
for stop in "girl" "a" "e gi" "decided to"; do
    got=$("$mamba" $model "$prompt" -t 0 -n 40 --no-echo --stop "$stop" --stop "never seen" \
        2> /dev/null)
    wanted=$(printf %s "$whole" | awk -v s="$stop" 'BEGIN { RS = "\001" } {
        i = index($0, s)
        printf "%s", i ? substr($0, 1, i - 1) : $0
    }')
    same "--stop '$stop'" "$got" "$wanted"
done

# --- states: cut a run anywhere, and the two halves are the whole
for sampling in "-t 0" "-s 5 -t 1 --repeat-penalty 1.1"; do
    "$mamba" $model "$prompt" $sampling -n 50 > "$dir/whole" 2> /dev/null
    for cut in 0 1 23; do
        rm -f "$dir/s"
        "$mamba" $model "$prompt" $sampling -n $cut --save-state "$dir/s" > "$dir/first" \
            2> /dev/null
        [ $cut -eq 0 ] && printf %s "$prompt" > "$dir/first"
        "$mamba" $model "" ${sampling#-s 5} --load-state "$dir/s" -n $((50 - cut)) \
            > "$dir/second" 2> /dev/null
        cat "$dir/first" "$dir/second" > "$dir/b"
        same_file "state after $cut tokens, $sampling" "$dir/b" "$dir/whole"
    done
done
fails "no such state" "none" $model "x" --load-state "$dir/none"
"$mamba" tests/odd.bin "x" -n 1 --save-state "$dir/odd" > /dev/null 2>&1
fails "a state of another shape" "another shape" $model "x" --load-state "$dir/odd"

# --- several texts at once: each is the text that it would be alone, whatever stands beside it and
# wherever it stops
printf '%s\n' "$prompt" "The old dog" "" "A cat sat on a" "He said" " 	" > "$dir/prompts"
i=0
while IFS= read -r line; do
    i=$((i + 1))
    [ -n "$line" ] || continue
    for sampling in "-s 7 -n 40" "-s 9 -t 1 -n 33 --stop the --no-echo"; do
        "$mamba" $model "$line" $sampling > "$dir/alone.$i.${sampling%% -n*}" 2> /dev/null
    done
done < "$dir/prompts"
for sampling in "-s 7 -n 40" "-s 9 -t 1 -n 33 --stop the --no-echo"; do
    for t in 1 2 3; do
        "$mamba" $model --batch "$dir/prompts" $sampling -T $t --null > "$dir/a" 2> "$dir/err"
        for i in 1 2 4 5; do cat "$dir/alone.$i.${sampling%% -n*}"; printf '\0'; done > "$dir/b"
        same_file "--batch, $sampling, $t threads: as alone" "$dir/a" "$dir/b"
    done
done
grep -q "4 texts: .* stop string" "$dir/err"
check "how the texts ended" "$dir/err"
tr '\n' '\r' < "$dir/prompts" | sed "s/\r/\r\n/g" | "$mamba" $model --batch - -s 9 -t 1 -n 33 \
    --stop the --no-echo --null > "$dir/a" 2> /dev/null
same_file "--batch from stdin, lines that end in CR LF" "$dir/a" "$dir/b"
"$mamba" $model --batch "$dir/prompts" -s 7 -n 5 --no-echo > "$dir/a" 2> /dev/null
same "a heading before each text, blank lines have none" \
    "$(grep '^=== line' "$dir/a" | tr -dc '0-9')" 1245
"$mamba" $model "$prompt" -s 7 -n 20 --samples 40 --null > "$dir/a" 2> /dev/null
same "--samples 40: as many texts" "$(tr -dc '\0' < "$dir/a" | wc -c | tr -d ' ')" 40
tr '\n\0' ' \n' < "$dir/a" | sort -u | awk 'END { exit !(NR > 30) }'
check "--samples: most of them different"
tr '\n\0' '\001\n' < "$dir/a" | sed -n 1p | tr '\001' '\n' > "$dir/first"
"$mamba" $model "$prompt" -s 7 -n 20 > "$dir/b" 2> /dev/null
echo >> "$dir/b"
same_file "--samples: the first is the one without" "$dir/first" "$dir/b"
"$mamba" $model "$prompt" -s 7 -n 20 --samples 3 --null > "$dir/b" 2> /dev/null
head -c "$(wc -c < "$dir/b")" "$dir/a" > "$dir/first"
same_file "--samples 3 are the first of 40" "$dir/first" "$dir/b"
"$mamba" $model --batch "$dir/prompts" --samples 2 -s 7 -n 9 --null > "$dir/a" 2> /dev/null
"$mamba" $model "$prompt" -s 7 -n 9 --samples 2 --null > "$dir/b" 2> /dev/null
head -c "$(wc -c < "$dir/b")" "$dir/a" > "$dir/first"
same_file "--batch with --samples: each line's are its own" "$dir/first" "$dir/b"
"$mamba" $model "$prompt" -n 0 --save-state "$dir/s" 2> /dev/null
"$mamba" $model "" --load-state "$dir/s" -s 7 -n 9 --samples 2 --no-echo --null > "$dir/a" \
    2> /dev/null
"$mamba" $model "$prompt" -s 7 -n 9 --samples 2 --no-echo --null > "$dir/b" 2> /dev/null
same_file "--samples from a loaded state" "$dir/a" "$dir/b"
head -c 200000 /dev/zero | tr '\0' a > "$dir/long"
"$mamba" $model --batch "$dir/long" -n 3 --no-echo > "$dir/a" 2> "$dir/err" &&
    grep -q "=== line 1" "$dir/a"
check "a line of 200 kB" "$dir/err"
printf 'good\nbad \377\n' > "$dir/bytes"
fails "a line that is not UTF-8" "line 2: the text is not UTF-8 at byte 4" $model --batch \
    "$dir/bytes"
fails "no such prompts" "no/such" $model --batch no/such
fails "an empty file of prompts" "empty" $model --batch /dev/null
printf '\n \n' > "$dir/blank"
fails "a file of blank lines" "blank lines" $model --batch "$dir/blank"
fails "no samples" "--samples" $model x --samples 0

# --- Ctrl-C: ends cleanly and saves
"$mamba" $model "$prompt" -n -1 --ignore-eos -s 1 --save-state "$dir/int" > "$dir/int.out" \
    2> "$dir/err" &
pid=$!
i=0
# more than the echoed prompt: it is writing
while [ "$(cat "$dir/int.out" 2> /dev/null | wc -c)" -le ${#prompt} ] && [ $i -lt 300 ]; do
    sleep 0.1
    i=$((i + 1))
done
kill -INT $pid
wait $pid
status=$?
if [ $status -eq 0 ] && [ -s "$dir/int" ] && grep -q interrupted "$dir/err"; then
    ok "Ctrl-C saves the state"
elif [ $status -gt 128 ] && ! grep -q tokens "$dir/err"; then
    skip "Ctrl-C saves the state" "this shell starts background jobs with SIGINT ignored"
else bad "Ctrl-C saves the state" "status $status: $(cat "$dir/err")"; fi

: > "$dir/int.out" # else the loop below may still see the text of the last run
"$mamba" $model "$prompt" -n -1 --ignore-eos -s 1 --save-state "$dir/term" > "$dir/int.out" \
    2> "$dir/err" &
pid=$!
i=0
while [ "$(cat "$dir/int.out" 2> /dev/null | wc -c)" -le ${#prompt} ] && [ $i -lt 300 ]; do
    sleep 0.1
    i=$((i + 1))
done
kill -TERM $pid
wait $pid
same "so does SIGTERM" "$? $([ -s "$dir/term" ] && echo saved)" "0 saved"
"$mamba" $model "$prompt" -n -1 --ignore-eos -t 0 --save-state "$dir/head" 2> "$dir/err" |
    head -c 200 > "$dir/a"
i=0
while [ ! -s "$dir/head" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
grep -q "state after" "$dir/err" && "$mamba" $model "" --load-state "$dir/head" -n 1 > /dev/null 2>&1
check "a pipe that closes saves the state" "$dir/err"
printf 'One day\nmore\n' | "$mamba" $model -n -1 --ignore-eos --save-state "$dir/head2" \
    2> "$dir/err" | head -c 200 > "$dir/a"
i=0
while [ ! -s "$dir/head2" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
[ -s "$dir/head2" ]
check "and ends a session" "$dir/err"

# --- prompts of other kinds
printf '%s\n' "$prompt" > "$dir/prompt"
"$mamba" $model "$prompt" -t 0 -n 9 > "$dir/a" 2> /dev/null
"$mamba" $model -f "$dir/prompt" -t 0 -n 9 > "$dir/b" 2> /dev/null
same_file "-f FILE without its last newline" "$dir/b" "$dir/a"
"$mamba" $model - -t 0 -n 9 < "$dir/prompt" > "$dir/b" 2> /dev/null
same_file "stdin without its last newline" "$dir/b" "$dir/a"
"$mamba" $model "$prompt
" -t 0 -n 9 > "$dir/a" 2> /dev/null
"$mamba" $model -f "$dir/prompt" --raw -t 0 -n 9 > "$dir/b" 2> /dev/null
same_file "--raw keeps it" "$dir/b" "$dir/a"
"$mamba" $model "One	day
a \\ A" -t 0 -n 9 > "$dir/a" 2> /dev/null
"$mamba" $model -e 'One\tday\na \\ \x41' -t 0 -n 9 > "$dir/b" 2> /dev/null
same_file "-e in a prompt" "$dir/b" "$dir/a"
printf '%s\n' 'One\tday\na \\ \x41' > "$dir/lines"
"$mamba" $model -e --batch "$dir/lines" -t 0 -n 9 --null 2> /dev/null | tr -d '\0' > "$dir/b"
same_file "-e in --batch" "$dir/b" "$dir/a"
same "-e in --stop" "$("$mamba" $model "$prompt" -t 0 -n 40 --no-echo --stop '\x67irl' -e 2> /dev/null)" \
    "$("$mamba" $model "$prompt" -t 0 -n 40 --no-echo --stop girl 2> /dev/null)"
fails "an escape that -e does not know" "\\q" $model -e 'a\qb'
fails "two prompts" "one prompt is needed" $model x -f "$dir/prompt"
list=$(printf %s "$prompt" | "$mamba" tokenize $model | paste -s -d , -)
"$mamba" $model "$prompt" -t 0 -n 9 > "$dir/a" 2> /dev/null
"$mamba" $model --tokens "$list" -t 0 -n 9 > "$dir/b" 2> /dev/null
same_file "--tokens in place of a prompt" "$dir/b" "$dir/a"
printf %s "$prompt" | "$mamba" tokenize $model | "$mamba" $model - --ids -t 0 -n 9 2> /dev/null |
    "$mamba" tokenize $model --decode > "$dir/b"
same_file "--ids between two tokenizers" "$dir/b" "$dir/a"
{ echo "$list"; echo "$list"; } | "$mamba" $model --batch - --ids -t 0 -n 9 --null 2> /dev/null |
    tr '\0' '\n' | awk 'BEGIN { RS = "" } NR == 2' | "$mamba" tokenize $model --decode > "$dir/b"
same_file "--ids with --batch" "$dir/b" "$dir/a"
same "--ids in a session" "$(echo "$list" | "$mamba" $model --ids -t 0 -n 9 2> /dev/null |
    "$mamba" tokenize $model --decode)" "$("$mamba" $model "$prompt" -t 0 -n 9 --no-echo 2> /dev/null)"
printf %s "$prompt" > "$dir/text"
"$mamba" tokenize $model "$dir/text" > "$dir/ids"
same "eval --ids" "$("$mamba" eval $model "$dir/ids" --ids 2> /dev/null)" \
    "$("$mamba" eval $model "$dir/text" 2> /dev/null)"
"$mamba" logits $model - --ids -o "$dir/l1" < "$dir/ids"
"$mamba" logits $model "$prompt" -o "$dir/l2"
same_file "logits --ids" "$dir/l1" "$dir/l2"
same "--no-special: a special token is text" "$(for how in "" --no-special; do
    # shellcheck disable=SC2086
    "$mamba" $model "a<|endoftext|>b" -n 0 $how 2>&1 | sed 's/.*prefill \([0-9]*\).*/\1/'
done | tr '\n' ' ')" "3 5 "
"$mamba" tokenize $model README.md > "$dir/train.ids"
train="train --from $model --steps 1 --batch 1 --length 16"
# shellcheck disable=SC2086
"$mamba" $train -o "$dir/by.text" --data README.md > /dev/null 2> "$dir/err" &&
    "$mamba" $train -o "$dir/by.ids" --data "$dir/train.ids" --ids > /dev/null 2> "$dir/err"
check "train on ids" "$dir/err"
same_file "is train on their text" "$dir/by.ids" "$dir/by.text"
"$mamba" $model --tokens " $(printf %s "$list" | sed 's/,/ , /g') " -t 0 -n 9 > "$dir/b" 2> /dev/null
same_file "--tokens with spaces" "$dir/b" "$dir/a"
"$mamba" $model --tokens "$list" -t0 -n9 > "$dir/b" 2> /dev/null
same_file "-n9 is -n 9" "$dir/b" "$dir/a"
fails "--tokens without commas" "between commas" $model --tokens "1 2"
fails "an id that the model does not know" "knows 0 to 2047" $model --tokens 1,9999
fails "text where ids are wanted" "byte 2" $model "5 x" --ids
fails "--ids with a stop string" "--stop" $model "5" --ids --stop x

# --- what stands beside the text
"$mamba" $model "$prompt" -t 0 -n 9 --quiet > "$dir/b" 2> "$dir/err"
same "--quiet" "$(cat "$dir/err")" ""
"$mamba" $model "$prompt" -t 0 -n 9 -q > "$dir/short" 2> "$dir/err" || echo "status" >> "$dir/err"
same "-q is --quiet" "$(cat "$dir/short" "$dir/err")" "$(cat "$dir/b")"
"$mamba" $model "$prompt" -t 0 -n 9 > "$dir/both" 2>&1
same "the timing has a line of its own" "$(grep -c '^load' "$dir/both")" 1

# --- interactive
printf '%s\n/undo\n%s\n\n/reset\n/undo\n/save %s\n/nope\n/quit\n' "$prompt" "$prompt" "$dir/live" \
    | "$mamba" $model -t 0 -n 12 > "$dir/a" 2> "$dir/err"
same "interactive: undo gives the same text again" "$(sed -n 1p "$dir/a")" "$(sed -n 2p "$dir/a")"
same "interactive: an empty line goes on" "$(sed -n '2,3p' "$dir/a" | tr -d '\n')" \
    "$("$mamba" $model "$prompt" -t 0 -n 24 --no-echo 2> /dev/null)"
[ -s "$dir/live" ]
check "interactive: /save"
grep -q "unknown command '/nope'" "$dir/err"
check "interactive: unknown command"

# --- tokenize, eval, logits, info, bench
printf '%s' "$prompt" > "$dir/text"
"$mamba" tokenize $model "$dir/text" > "$dir/ids"
same "23 tokens" "$(wc -l < "$dir/ids" | tr -d ' ')" 23
"$mamba" tokenize $model "$dir/ids" --decode > "$dir/b"
same_file "decode undoes encode" "$dir/b" "$dir/text"
same "tokens by stdin" "$("$mamba" tokenize $model < "$dir/text" | md5sum)" "$(md5sum < "$dir/ids")"
"$mamba" eval $model "$dir/text" > "$dir/a" 2> /dev/null
same "eval counts" "$(sed -n 1p "$dir/a")" "tokens         23 (22 predicted)"
"$mamba" eval $model "$dir/text" --each > "$dir/b" 2> "$dir/err"
same "--each prints one value a prediction" "$(wc -l < "$dir/b" | tr -d ' ')" 22
mean=$(awk '{ s += $1 } END { printf "%.4f", s / NR }' "$dir/b")
same "--each has eval's mean" "$mean" "$(awk '/mean_nll/ { printf "%.4f", $2 }' "$dir/a")"
list=$(tr '\n' ',' < "$dir/ids" | sed 's/,$//')
"$mamba" logits $model --tokens "$list" -o "$dir/l1" && "$mamba" logits $model "$prompt" -o \
    "$dir/l2"
same_file "logits of ids and of text" "$dir/l1" "$dir/l2"
"$mamba" logits $model "$prompt" --all -o "$dir/l3"
same "--all writes (L,V) float32" "$(wc -c < "$dir/l3" | tr -d ' ')" $((23 * 2048 * 4))
# hidden states and rows: against each other (tests/test_model.h has transformers' numbers)
"$mamba" logits $model "$prompt" --hidden --all > "$dir/h"
"$mamba" logits $model "$prompt" --hidden > "$dir/h1"
"$mamba" logits $model "$prompt" --hidden --pool last | cmp -s - "$dir/h1" \
    && tail -n 1 "$dir/h" | cmp -s - "$dir/h1" && ok "--hidden, --pool last" \
    || bad "--hidden, --pool last" "$(cut -c1-60 "$dir/h1")"
"$mamba" logits $model "$prompt" --hidden --pool mean | tr ' ' '\n' > "$dir/h2"
awk '{ for (i = 1; i <= NF; i++) s[i] += $i } END { for (i = 1; i <= NF; i++) print s[i] / NR }' \
    "$dir/h" | paste - "$dir/h2" | awk '{ d = $1 - $2; if (d > 1e-5 || d < -1e-5) bad = 1 }
    END { exit !(NR > 20 && !bad) }' && ok "--pool mean" || bad "--pool mean"
"$mamba" logits $model "$prompt" --hidden --all -o "$dir/h3"
same "--hidden as float32" "$(wc -c < "$dir/h3" | tr -d ' ')" \
    "$(awk '{ n += 4 * NF } END { print n }' "$dir/h")"
row() { # row ID: of tests/plain.bin's embedding, 32 float32 each from byte 320 on
    tail -c +$((320 + 128 * $1 + 1)) tests/plain.bin | head -c 128
}
{ row 72; row 101; row 7; } > "$dir/rows"
"$mamba" logits tests/plain.bin --tokens 72,101,7 --all -o "$dir/l4"
"$mamba" logits tests/plain.bin --embeddings "$dir/rows" --all -o "$dir/l5"
same_file "--embeddings: rows in the place of ids" "$dir/l5" "$dir/l4"
fails "--embeddings that are no rows" "whole rows of 32 float32" logits tests/plain.bin \
    --embeddings README.md
head -c 128 /dev/zero | tr '\000' '\377' > "$dir/nan"
fails "--embeddings that are not finite" "is not finite" logits tests/plain.bin --embeddings \
    "$dir/nan"
fails "--pool of what" "--pool needs" logits $model x --hidden --pool sum
fails "--pool of logits" "--hidden" logits $model x --pool mean
printf 'Once upon a time there was a king.<|endoftext|>' > "$dir/d1"
printf 'The cat sat down. It slept.<|endoftext|>' > "$dir/d2"
cat "$dir/d1" "$dir/d2" > "$dir/d12"
for d in d1 d2; do "$mamba" eval models/tales.bin "$dir/$d" --each 2> /dev/null; done > "$dir/want"
"$mamba" eval models/tales.bin "$dir/d12" --split eot --each > "$dir/got" 2> /dev/null
same_file "eval --split eot scores each document alone" "$dir/got" "$dir/want"
fails "--split of what" "--split needs eot" eval models/tales.bin "$dir/d12" --split line
same "logits as text" \
    "$("$mamba" logits $model "$prompt" --all | awk '{ n += NF } END { print NR, n }')" \
    "23 $((23 * 2048))"
"$mamba" info $model --verify | grep -q "every weight is finite"
check "info --verify"
cp $model "$dir/flipped" && printf 'X' | dd of="$dir/flipped" bs=1 seek=3000000 conv=notrunc \
    2> /dev/null
"$mamba" info "$dir/flipped" --verify > /dev/null 2> "$dir/err"
grep -q "damaged\|finite" "$dir/err"
check "info --verify finds a changed byte" "$dir/err"
"$mamba" bench --shape 32,2,300 -r 2 > "$dir/a" 2>&1 && grep -q "decode .* tokens/s" "$dir/a"
check "bench" "$dir/a"
"$mamba" bench --scan 1,20,500 -r 2 > "$dir/a" 2>&1 && grep -q "over channels and time" "$dir/a"
check "bench --scan" "$dir/a"
for command in "" info tokenize eval logits quantize bench; do
    "$mamba" $command --help > "$dir/a" 2>&1 && grep -q "mamba" "$dir/a"
    check "help for '$command'"
done

# --- quantize
for type in q8 q4; do
    "$mamba" quantize $model "$dir/$type" $type > "$dir/a" 2> "$dir/err" &&
        [ ! -s "$dir/a" ] && grep -q "wrote .*$type" "$dir/err"
    check "quantize $type" "$dir/err"
    "$mamba" info "$dir/$type" --verify | grep -q "parameters in $type"
    check "info of $type"
    "$mamba" "$dir/$type" "$prompt" -t 0 -n 30 -T 1 > "$dir/a" 2> /dev/null
    "$mamba" "$dir/$type" "$prompt" -t 0 -n 30 -T 2 > "$dir/b" 2> /dev/null
    same_file "$type: same text, any threads" "$dir/a" "$dir/b"
    "$mamba" bench --shape 64,1,300 --dtype $type -r 1 > "$dir/a" 2>&1 &&
        grep -q "in $type" "$dir/a"
    check "bench --dtype $type" "$dir/a"
done
"$mamba" eval $model "$dir/text" 2> /dev/null | awk '/mean_nll/ { print $2 }' > "$dir/nll"
for type in q8 q4; do
    "$mamba" eval "$dir/$type" "$dir/text" 2> /dev/null |
        awk '/mean_nll/ { print $2 }' >> "$dir/nll"
done
awk '{ x[NR] = $1 } END {
    d = x[2] / x[1] - 1
    e = x[3] / x[1] - 1
    exit !(NR == 3 && d < 0.02 && d > -0.02 && e < 0.1 && e > -0.1)
}' "$dir/nll"
check "the likelihood of a short text stays near" "$dir/nll"
"$mamba" train -o "$dir/tuned" --from "$dir/q8" --data README.md --steps 1 --batch 1 --length 16 \
    > /dev/null 2> "$dir/err" &&
    "$mamba" info "$dir/tuned" | grep -q "in f32"
check "train --from a quantized model" "$dir/err"
cp $model "$dir/copy"
fails "quantize onto its input" "that is the model; choose another name" quantize "$dir/copy" \
    "$dir/../$(basename "$dir")/copy" q8
same_file "which stays as it was" $model "$dir/copy"
fails "quantize what is quantized" "already" quantize "$dir/q8" "$dir/c" q4
fails "quantize to another type" "q5" quantize $model "$dir/c" q5
fails "quantize without a type" "needs in.bin" quantize $model "$dir/c"
fails "quantize to nowhere" "no/such" quantize $model "$dir/no/such/c" q8
fails "quantize a damaged model" "damaged" quantize "$dir/flipped" "$dir/c" q8
[ ! -e "$dir/c" ]
check "and nothing is written"

# --- files: an output is the old file or the whole new one, and never an input; no other file is
# touched
files=$dir/files
mkdir "$files"
cp $model "$files/m.tmp"
"$mamba" quantize "$files/m.tmp" "$files/m" q8 2> "$dir/err" && cmp -s "$files/m" "$dir/q8" \
    && cmp -s "$files/m.tmp" $model
check "the input is named as the output and .tmp" "$dir/err"
rm "$files"/*
echo precious > "$files/other"
ln -s other "$files/s.tmp" # what stood in the way of the old fixed name: a link, then a pipe
"$mamba" $model "x" -n 2 --save-state "$files/s" > /dev/null 2>&1
same "a link named .tmp is not followed" "$(cat "$files/other") $(ls "$files" | tr '\n' ' ')" \
    "precious other s s.tmp "
rm "$files/s.tmp"
mkfifo "$files/s.tmp"
"$mamba" $model "x" -n 2 --save-state "$files/s" > /dev/null 2>&1 &
pid=$!
i=0
while kill -0 $pid 2> /dev/null && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
kill -9 $pid 2> /dev/null && bad "a pipe named .tmp does not hang" \
    || ok "a pipe named .tmp does not hang"
wait $pid 2> /dev/null
rm "$files"/*
"$mamba" $model "x" -n 2 -t 0 -s 1 --save-state "$dir/plain" > /dev/null 2>&1
cp "$dir/odd" "$files/s" # an older state
chmod 640 "$files/s"
mkdir "$files/sub"
ln -s ../s "$files/sub/link"
"$mamba" $model "x" -n 2 -t 0 -s 1 --save-state "$files/sub/link" > /dev/null 2>&1
[ -L "$files/sub/link" ] && cmp -s "$files/s" "$dir/plain"
check "through a link: the file that it names is written"
same "the mode of the old file" "$(ls -l "$files/s" | cut -c1-10)" "-rw-r-----"
rm "$files/s"
"$mamba" $model "x" -n 2 -t 0 -s 1 --save-state "$files/sub/link" > /dev/null 2>&1
[ -L "$files/sub/link" ] && cmp -s "$files/s" "$dir/plain"
check "through a link to nothing yet"
same "no temporary stays" "$(ls "$files" "$files/sub" | grep -c 'tmp$')" 0
long=$(head -c 250 /dev/zero | tr '\0' n)
"$mamba" $model "x" -n 2 -t 0 -s 1 --save-state "$files/$long" > /dev/null 2>&1
same_file "a name of 250 bytes" "$files/$long" "$dir/plain"
rm -r "$files"/*
torn=0
for i in 1 2 3 4 5 6; do # two programs, one target
    "$mamba" quantize $model "$files/q" q8 2> "$dir/err1" & one=$!
    "$mamba" quantize $model "$files/q" q8 2> "$dir/err2" & other=$!
    wait $one && wait $other && cmp -s "$files/q" "$dir/q8" || torn=$((torn + 1))
done
same "two writers of one file" "$torn $(ls "$files")" "0 q"
rm "$files"/*
cp tests/odd.bin "$files/q"
(ulimit -f 100; "$mamba" quantize $model "$files/q" q8 2> "$dir/err")
status=$?
same "a file that becomes too large: the old one stays" \
    "$status $(cksum < "$files/q") $(ls "$files")" "1 $(cksum < tests/odd.bin) q"
grep -q "cannot write $files/q: File too large" "$dir/err"
check "and a sentence says so" "$dir/err"
yes "one more day " | tr -d '\n' | head -c 40000 > "$dir/long"
"$mamba" logits $model - --all -o "$files/l" < "$dir/long" 2> /dev/null &
pid=$!
i=0
while [ "$(ls "$files" | wc -l)" -lt 2 ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
kill -TERM $pid
wait $pid
same "a killed program removes its temporary" "$? $(ls "$files")" "143 q"
rm "$files"/*

# unharmed NAME WORD FILE ARGUMENTS: refused with WORD before anything is written; FILE, a copy of
# the model, stays
unharmed() {
    name=$1 word=$2 file=$3
    shift 3
    fails "$name" "$word" "$@"
    cmp -s "$file" $model
    check "$name: the file stays"
    cp $model "$file"
}
cp $model "$files/m"
ln -s m "$files/link"
ln "$files/m" "$files/hard"
unharmed "a state onto the model" "--save-state $files/m: that is the model; choose another name" \
    "$files/m" "$files/m" x -n 2 --save-state "$files/m"
unharmed "a state onto the model by another path" "that is the model" "$files/m" "$files/m" x -n \
    2 --save-state "$files/../files/m"
unharmed "a state onto the model by a link" "that is the model" "$files/m" "$files/m" x -n 2 \
    --save-state "$files/link"
rm "$files/hard"; ln "$files/m" "$files/hard"
fails "a state onto the model by its other name" "that is the model" "$files/m" x -n 2 \
    --save-state "$files/hard"
unharmed "logits onto the model" "-o $files/m: that is the model" "$files/m" logits "$files/m" x \
    -o "$files/m"
fails "an empty name" "--save-state needs a file name" $model x -n 2 --save-state ""
fails "an empty name of logits" "-o needs a file name" logits $model x -o ""
fails "a folder for logits" "$files" logits $model x -o "$files"
fails "logits to nowhere" "no/such" logits $model x -o "$files/no/such/file"
cp "$dir/text" "$files/t"
"$mamba" logits $model - -o "$files/t" < "$files/t" > /dev/null 2> "$dir/err"
same "logits onto the file on stdin: status 1, it stays" "$? $(cat "$files/t")" \
    "1 $(cat "$dir/text")"
"$mamba" $model "x" -n 2 -t 0 -s 1 --save-state "$files/s" > /dev/null 2>&1
"$mamba" $model "" -n 3 -t 0 --load-state "$files/s" --save-state "$files/s" > /dev/null 2> \
    "$dir/err"
"$mamba" $model "x" -n 5 -t 0 -s 1 --save-state "$files/whole" > /dev/null 2>&1
same_file "a state goes on in place" "$files/s" "$files/whole"
printf 'x\n/save %s\n/save \n/save %s\n' "$files/m" "$files/live" | "$mamba" "$files/m" -n 2 > \
    /dev/null 2> "$dir/err"
cmp -s "$files/m" $model && grep -q "/save $files/m: that is the model" "$dir/err" \
    && grep -q "/save needs a file name" "$dir/err" && [ -s "$files/live" ]
check "interactive: /save onto the model" "$dir/err"
"$mamba" logits $model x -o "$files/raw"
"$mamba" logits $model x -o /dev/fd/1 > "$files/out"
same_file "logits to its stdout, a file" "$files/out" "$files/raw"
"$mamba" logits $model x -o /dev/fd/1 | cat > "$files/out"
same_file "logits to its stdout, a pipe" "$files/out" "$files/raw"
ln -s /dev/full "$files/full"
"$mamba" logits $model x -o "$files/full" 2> "$dir/err"
same "logits to a full disk" "$? $(cat "$dir/err")" \
    "1 mamba: cannot write $files/full: No space left on device"

# An output replaces a file of its own kind, or an empty one, and no other.
kept() { # kept NAME WORD FILE ARGUMENTS: refused with WORD, FILE stays
    name=$1 word=$2 file=$3
    shift 3
    cp "$file" "$dir/before"
    fails "$name" "$word" "$@"
    same_file "$name: it stays" "$file" "$dir/before"
}
cp "$dir/text" "$files/t"
cp tests/odd.bin "$files/other"
printf 'mtok and more' > "$files/tok"
kept "a state onto another model" "--save-state $files/other: that holds a model, not a state; choose \
another name, or remove it" "$files/other" $model x -n 2 --save-state "$files/other"
kept "a state onto a text" "that holds something else, not a state" "$files/t" $model x -n 2 \
    --save-state "$files/t"
kept "a quantized model onto a text" "$files/t: that holds something else, not a model" "$files/t" \
    quantize $model "$files/t" q8
kept "a quantized model onto a state" "$files/s: that holds a state, not a model" "$files/s" \
    quantize $model "$files/s" q8
for held in m s tok; do
    kept "logits onto $held" "-o $files/$held: that holds a" "$files/$held" logits $model x -o \
        "$files/$held"
    kept "hidden states onto $held" "that holds a" "$files/$held" logits $model x --hidden -o \
        "$files/$held"
done
printf 'x\n/save %s\n/save %s\n/save\n/load\n' "$files/other" "$files/t" | "$mamba" $model -n 2 > \
    /dev/null 2> "$dir/err"
cmp -s "$files/other" tests/odd.bin && cmp -s "$files/t" "$dir/text" &&
    [ "$(grep -c "not a state" "$dir/err")" -eq 2 ] && grep -q "/load needs a file name" "$dir/err"
check "interactive: /save onto another model and onto a text" "$dir/err"
: > "$files/empty"
"$mamba" $model x -n 2 --save-state "$files/empty" > /dev/null 2> "$dir/err" &&
    "$mamba" $model "" -n 1 --load-state "$files/empty" > /dev/null 2>> "$dir/err"
check "a state onto an empty file" "$dir/err"
"$mamba" $model y -n 2 --save-state "$files/empty" > /dev/null 2> "$dir/err" &&
    "$mamba" logits $model x -o "$files/raw"
check "a state onto another, logits onto others" "$dir/err"

# --- the likeliest tokens
"$mamba" logits $model "$prompt" | tr ' ' '\n' | awk '{ print NR - 1, $1 }' | sort -k2,2gr -k1,1n |
    head -n 7 | awk '{ printf "%d %.4f\n", $1, $2 }' > "$dir/a"
"$mamba" logits $model "$prompt" --top 7 > "$dir/b"
cut -f1,2 "$dir/b" | tr '\t' ' ' > "$dir/c"
same_file "logits --top: ids and logits" "$dir/c" "$dir/a"
"$mamba" logits $model "$prompt" | tr ' ' '\n' | awk -v top="$(head -n 1 "$dir/b" | cut -f3)" '
    { x[NR] = $1; if (NR == 1 || $1 > best) best = $1 }
    END { for (i = 1; i <= NR; i++) sum += exp(x[i] - best)
          d = 1 / sum - top; exit !(NR > 1 && d < 1e-5 && d > -1e-5) }'
check "and the probability" "$dir/b"
same "and the text" "$(head -n 1 "$dir/b" | cut -f4)" "$("$mamba" $model "$prompt" -t 0 -n 1 \
    --no-echo 2> /dev/null)"
same "--top of all tokens" "$("$mamba" logits $model --tokens 1,2,3 --top 5 --all | grep -c .)" 15
same "--top of more than there are" "$("$mamba" logits tests/odd.bin x --top 9999 | cut -f1 |
    sort -nu | wc -l | tr -d ' ')" "$("$mamba" logits tests/odd.bin x | wc -w | tr -d ' ')"
fails "--top with -o" "--top" logits $model x --top 3 -o "$files/raw"

# --- show-selection: a line a token; all layers' mean is the mean of each layer's
text="One day a small dog
ran away"
"$mamba" $model "$text" --show-selection > "$dir/all" 2> "$dir/err" ||
    bad "show-selection" "$(cat "$dir/err")"
"$mamba" tokenize $model - <<EOF > "$dir/ids"
$text
EOF
cut -f1 "$dir/all" > "$dir/shown"
sed '$d' "$dir/ids" > "$dir/wanted" # the here-document ends in a newline, the prompt does not
same_file "a line a token" "$dir/shown" "$dir/wanted"
layers=$("$mamba" info $model | sed -n 's/.*n_layer \([0-9]*\).*/\1/p')
i=0
while [ $i -lt "${layers:-0}" ]; do
    "$mamba" $model "$text" --show-selection --layer $i | cut -f2 > "$dir/layer$i"
    i=$((i + 1))
done
cut -f2 "$dir/all" | paste - "$dir"/layer[0-9]* | awk '{
    s = 0
    for (i = 2; i <= NF; i++) s += $i
    d = s / (NF - 1) / $1 - 1
    if (d > 1e-4 || d < -1e-4 || NF < 3) bad = 1
} END { exit bad || !NR }'
check "the mean of all layers"
fails "no such layer" "--layer" $model "x" --show-selection --layer 99
fails "nothing to show" "needs a prompt" $model --show-selection

# --- errors
fails "no such model" "no-such-model" no-such-model "x"
fails "unknown option" "--frobnicate" $model "x" --frobnicate
fails "missing value" "-n" $model "x" -n
fails "not UTF-8" "byte 3" $model "$(printf 'abc\377')"
fails "eval of an empty text" "0 token" eval $model /dev/null
fails "an unwritable state, before anything is written" "no/such" $model "x" -n 5 --save-state \
    "$dir/no/such/state"
"$mamba" $model "x" -n 5 -t 0 > /dev/full 2> "$dir/err" && bad "a full disk is an error" ||
    ok "a full disk is an error"

# --- standard streams that are closed: no file takes their place
tiny="--steps 2 --d-model 16 --layers 1 --batch 1 --length 32"
"$mamba" train -o "$dir/closed" --data README.md $tiny 2>&- >&- <&- &&
    ! grep -qvE '^[0-9.,e-]+$|^step,' "$dir/closed.csv" && "$mamba" info "$dir/closed" --verify \
    > "$dir/a"
check "training with closed streams: log and model are whole" "$dir/closed.csv"
"$mamba" $model "x" -n 2 2> "$dir/err" >&-
same "a closed stdout is an error" "$? $(grep -c 'stdout: cannot write' "$dir/err")" "1 1"
"$mamba" $model 2> "$dir/err" <&- > "$dir/a"
same "a closed stdin is an error" "$? $(grep -c 'stdin: ' "$dir/err")" "1 1"

# --- a model that is overwritten in place while it runs
# starts MODEL ARGUMENTS: a run in the background, $pid, that has begun to write
starts() {
    : > "$dir/live.out"
    "$mamba" "$@" > "$dir/live.out" 2> "$dir/err" &
    pid=$!
    i=0
    while [ ! -s "$dir/live.out" ] && [ $i -lt 300 ]; do sleep 0.05; i=$((i + 1)); done
}
"$mamba" $model "$prompt" -t 0 -n 2000 --no-echo --ignore-eos > "$dir/a" 2> /dev/null
cp $model "$dir/live"
starts "$dir/live" "$prompt" -t 0 -n 2000 --no-echo --ignore-eos
: > "$dir/live"
wait $pid
same "a small model: status 0" $? 0
same_file "a small model that is overwritten writes on as before" "$dir/live.out" "$dir/a"
if [ "$everything" = all ]; then
    "$mamba" train -o "$dir/big" --data README.md --steps 1 --d-model 768 --layers 3 --batch 1 \
        --length 8 2> /dev/null
    starts "$dir/big" "x" -n -1 --ignore-eos
    : > "$dir/big"
    wait $pid
    same "a large one: a sentence" "$? $(grep -c 'big: cut short while it was in use' "$dir/err")" \
        "1 1"
    rm -f "$dir"/big*
fi

# --- a tokenizer of four words, made by hand, whose template puts <s> before a prompt
u32() { for n in "$@"; do printf "\\$(printf %o "$n")\0\0\0"; done; }
{
    printf mtok && u32 2 3 && printf '\0\020\0\0' && u32 9 4 0 0 0 1 0 0 0 0 0 0
    u32 3 && printf '<s>' && u32 5 && printf '<unk>' && u32 1 && printf a && u32 1 && printf b
} > "$dir/words.bin"
same "words become ids" "$(printf %s ' a b  x a' | "$mamba" tokenize "$dir/words.bin" | tr '\n' ' ')" \
    "2 3 1 2 "
same "and words again" "$(echo 2 3 1 2 | "$mamba" tokenize "$dir/words.bin" --decode)" "a b <unk> a"
echo "a b b a b" > "$dir/text"
"$mamba" train -o "$dir/m.bin" --tokenizer "$dir/words.bin" --data "$dir/text" --steps 1 --batch 1 \
    --length 3 --d-model 8 --layers 1 > "$dir/out" 2>&1
check "a model of words" "$dir/out"
"$mamba" info "$dir/m.bin" | grep -q "words, 4 ids, 0 before a prompt"
check "info tells what goes before a prompt"
lines() { "$mamba" "$@" 2> "$dir/err" | wc -l | tr -d ' '; }
same "a prompt begins with <s>" "$(lines logits "$dir/m.bin" "a b" --all)" 3
same "--no-bos leaves it out" "$(lines logits "$dir/m.bin" "a b" --all --no-bos)" 2
"$mamba" logits "$dir/m.bin" --tokens 0,2,3 > "$dir/a"
"$mamba" logits "$dir/m.bin" "a b" > "$dir/b"
same_file "it is the token that stands there" "$dir/a" "$dir/b"
"$mamba" "$dir/m.bin" "a b" -n 3 -t 0 --ignore-eos > "$dir/a" 2> "$dir/err"
grep -q "prefill 3 tokens" "$dir/err"
check "and is read before a text" "$dir/err"
grep -qE '^a b( [^ ]+){3}$' "$dir/a"
check "a space before each word that follows" "$dir/a"
"$mamba" "$dir/m.bin" "" -n 3 -t 0 --ignore-eos > "$dir/a" 2> "$dir/err"
grep -qE '^[^ ]+( [^ ]+){2}$' "$dir/a"
check "but none at the start of a text" "$dir/a"
"$mamba" "$dir/m.bin" "a b" -n 0 --no-bos 2>&1 | grep -q "prefill 2 tokens"
check "--no-bos for a text"
# A document of a split text begins as a text of its own: with <s>, also where <s> ends documents.
for bos in 0 4; do
    {
        printf mtok && u32 2 3 && printf '\0\020\0\0' && u32 9 5 0 0 $bos 1 0 0 0 0 0 0
        u32 3 && printf '<s>' && u32 5 && printf '<unk>' && u32 1 && printf a && u32 1 && printf b
        u32 13 && printf '<|endoftext|>'
    } > "$dir/words.bin"
    "$mamba" train -o "$dir/m.bin" --tokenizer "$dir/words.bin" --data "$dir/text" --steps 1 \
        --batch 1 --length 3 --d-model 8 --layers 1 --force > "$dir/out" 2>&1
    for d in "b b a <|endoftext|>" "a <|endoftext|>" "a"; do
        printf %s "$d" > "$dir/d1" && printf '%s ' "$d" >> "$dir/d$bos"
        "$mamba" eval "$dir/m.bin" "$dir/d1" --each 2> /dev/null
    done > "$dir/want"
    "$mamba" eval "$dir/m.bin" "$dir/d$bos" --split eot --each > "$dir/got" 2> /dev/null
    same "a number for each token" "$(wc -l < "$dir/got" | tr -d ' ')" 7
    same_file "eval --split eot begins each document with token $bos" "$dir/got" "$dir/want"
    "$mamba" eval "$dir/m.bin" "$dir/d$bos" --split eot --each --no-bos > "$dir/got" 2> /dev/null
    same "without it the first token of a document is not predicted" "$(wc -l < "$dir/got" | tr -d ' ')" 4
    for d in "b b a <|endoftext|>" "a <|endoftext|>" "a"; do
        printf %s "$d" > "$dir/d1" && "$mamba" eval "$dir/m.bin" "$dir/d1" 2> /dev/null
    done | awk '/mean_nll/ { printf "%.4f\n", $2 }' | sort > "$dir/want"
    "$mamba" train -o "$dir/rows.bin" --from "$dir/m.bin" --documents --data "$dir/d$bos" --lr 0 \
        --min-lr 0 --batch 1 --length 8 --held-out 0 --steps 40 --force > "$dir/out" 2>&1
    sed 1d "$dir/rows.bin.csv" | cut -d, -f4 | awk '{ printf "%.4f\n", $1 }' | sort -u > "$dir/got"
    same_file "and so does train --documents" "$dir/got" "$dir/want"
done

# --- memory: a long prompt takes no more than a short one
if [ "$everything" = all ]; then
    tokens=1048576
    yes "one more day " | tr -d '\n' | head -c 13000 > "$dir/short"
    yes "one more day " | tr -d '\n' | head -c 4600000 > "$dir/long"
    for size in short long; do
        "$mamba" $model - -n 0 < "$dir/$size" 2> "$dir/$size.err"
    done
    grep -q "prompt: .* tokens/s, .* s left" "$dir/long.err"
    check "a long prompt says how far it is" "$dir/long.err"
    read_tokens=$(sed -n 's/.*prefill \([0-9]*\) tokens.*/\1/p' "$dir/long.err")
    short=$(sed -n 's/.*peak memory \([0-9.]*\) MB.*/\1/p' "$dir/short.err")
    long=$(sed -n 's/.*peak memory \([0-9.]*\) MB.*/\1/p' "$dir/long.err")
    if [ -z "$short" ]; then skip "constant memory" "the platform does not tell its peak memory"
    else
        # aside: four bytes a token
        extra=$(awk -v l="$long" -v s="$short" -v n="$read_tokens" \
            'BEGIN { printf "%.1f", l - s - 4e-6 * n }')
        echo \
            "     $read_tokens tokens: $long MB, short prompt: $short MB, beyond the ids: $extra MB"
        awk -v e="$extra" -v n="$read_tokens" -v t=$tokens 'BEGIN { exit !(e < 1 && n >= t) }'
        check "constant memory"
    fi
else skip "a million tokens of prompt" "only in make test-all"; fi

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
