#!/bin/sh
# tests/test_help.sh ./mamba: what someone types in the first minutes, and the answer; the help, the
# man page and the completion. The last line is `N passed, N failed, N skipped`.
mamba=$1
case $mamba in /*) ;; *) mamba=$PWD/$mamba ;; esac
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0

ok()   { passed=$((passed + 1)); echo "ok   $1"; }
bad()  { failed=$((failed + 1)); echo "FAIL $1"; [ -z "$2" ] || printf '     %s\n' "$2"; }
check() { # check NAME [FILE]: whether the command before succeeded; FILE tells why it did not
    checked=$?
    if [ $checked -eq 0 ]; then ok "$1"; else bad "$1" "${2:+$(cat "$2")}"; fi
}
skip() { skipped=$((skipped + 1)); echo "skip $1: $2"; }

# answers TEXT ARGUMENTS: exit status 1, nothing on stdout, and one line on stderr that has TEXT
answers() {
    text=$1
    shift
    "$mamba" "$@" > "$dir/out" 2> "$dir/err" < /dev/null
    status=$?
    name=$(printf %s "mamba $*" | tr '\n' ' ' | cut -c1-70)
    if [ $status -eq 1 ] && [ ! -s "$dir/out" ] && [ "$(wc -l < "$dir/err")" -eq 1 ] &&
        grep -qF -- "$text" "$dir/err"; then
        ok "$name"
    else bad "$name" "status $status: $(cat "$dir/err")"; fi
}
# writes TEXT ARGUMENTS: exit status 0, TEXT on stdout
writes() {
    text=$1
    shift
    "$mamba" "$@" > "$dir/out" 2> "$dir/err" < /dev/null && grep -qF -- "$text" "$dir/out"
    check "mamba $*" "$dir/err"
}

m=models/tales.bin
# --- the model: missing, in another place, something else
answers 'mamba models/story.bin "Once upon a time"' "Once upon a time"
answers "mamba $m \"Once upon\"" "Once upon" $m
answers "mamba $m \"Once\"" Once $m
answers 'example models/copying.bin' models
cp README.md "$dir/de.txt"
answers "my.txt: No such file" "$dir/my.txt" "Once" # de.txt is no model
answers "the model comes first: mamba eval $m README.md" eval README.md $m
answers "the model comes first: mamba tokenize $m README.md" tokenize README.md $m
answers "the model comes first: mamba logits $m \"Once\"" logits Once $m
answers "Once upon: no such file; tokenize reads a file, or a text from stdin" tokenize $m "Once upon"
answers "| mamba eval $m -" eval $m "Once upon"
answers "did you mean models/tales.bin?" tales.bin "Once"
answers "did you mean models/tales.bin?" tales
answers "did you mean models/tales.bin?" info models/tale.bin
answers "python export.py state-spaces/mamba-130m-hf model.bin" state-spaces/mamba-130m-hf "Hi"
mkdir "$dir/hub"
echo '{}' > "$dir/hub/config.json"
printf '\020\000\000\000\000\000\000\000{"a":1}        ' > "$dir/hub/model.safetensors"
printf 'GGUF\003\000\000\000\000\000\000\000\000\000\000\000' > "$dir/model.gguf"
printf 'PK\003\004\000\000\000\000\000\000\000\000\000\000\000\000' > "$dir/pytorch_model.bin"
"$mamba" $m x -n 1 --save-state "$dir/state" > "$dir/out" 2>&1
answers "python export.py $dir/hub model.bin" "$dir/hub"
answers "safetensors file: make a model.bin" "$dir/hub/model.safetensors"
answers "python export.py $dir/model.gguf model.bin" info "$dir/model.gguf"
answers "PyTorch file" "$dir/pytorch_model.bin" "Hi"
answers "--load-state" "$dir/state" "Hi"
answers "not a model.bin" README.md "Hi"
answers "a folder with a checkpoint" tokenize "$dir/hub"
answers "No such file" train -o "$dir/x" --from models/none.bin --data README.md

# --- the command
for line in "tran:mamba train" "trian:mamba train" "inof:mamba info" "serve:is a session" \
    "chat:is a session" "convert:export.py" "quantise:mamba quantize"; do
    answers "${line#*:}" "${line%%:*}" --data x
done

# --- the options
answers "the model is the first argument" -m $m -p "Once"
answers "without a prompt it is a session" $m -i
answers "the prompt 'Once upon' goes without an option" $m -p "Once upon"
answers "did you mean -t X?" $m "Once" --temp 0.7
answers "did you mean -s SEED?" $m "Once" --seed=3
answers "did you mean -t X?" $m "Once" --temprature 0.7
answers "-p needs a number, not '0,9'" $m "Once" -p 0,9
answers "-t needs a number, not '0,7': a point" $m "Once" -t0,7
answers "did you mean -n N?" $m "Once" --max_new_tokens 200
answers "did you mean -T N?" $m "Once" --threads 2
answers "did you mean --no-echo?" $m "Once" --no_echo
answers "did you mean --save-state FILE?" $m "Once" --save-sate x
answers "did you mean --verify?" info $m --verfy
answers "did you mean --lr X?" train --learning-rate 1e-3
answers "did you mean --steps N?" train --epochs 3
answers "mamba --version" --verison
answers "(make cuda)" $m "Once" --gpu
answers "there is no context size" $m "Once" --ctx-size 2048
answers "put -- before a prompt" $m "---She"
answers "'upon' (what has spaces needs quotes)" $m Once upon a time
answers "one argument too many: '$m'" info $m $m
if grep -q needs "$dir/err"; then bad "and no word of quotes"; else ok "and no word of quotes"; fi
answers "no chat template: it goes on with a text" $m "Once" --chat
answers "-n needs a value" $m "Once" -n
answers "-n needs a whole number, not '1e3'" $m "Once" -n 1e3

# --- training
answers "--data before it" train my.txt -o out.bin
answers "train needs -o FILE" train --data README.md
answers "either --data or --task" train -o "$dir/out.bin"

# --- what looks like a mistake and is none
writes "-5 degrees" $m "-5 degrees" -n 2
writes "- a list" $m "- a list" -n 2
writes "Once" $m "Once" --stop -h -n 2
writes "Once" $m "Once" --stop --help -n=2 -t=0
writes "Once" generate $m "Once" -n 2

# --- a long path hides neither the beginning of the sentence nor the reason
long=$(head -c 3000 /dev/zero | tr '\0' p)
answers "File name too long" "$long"
answers "File name too long" $m "Once" -n 1 --save-state "$long"
answers "File name too long" eval $m "$long"
answers "cannot write ppp" logits $m "Once" -o "$long"

# --- help
"$mamba" > "$dir/out" 2> "$dir/err"
[ $? -eq 1 ] && [ "$(grep -c '^  mamba ' "$dir/err")" -eq 3 ]
check "mamba alone shows three examples" "$dir/err"
"$mamba" help > "$dir/help" 2>&1
check "mamba help" "$dir/help"
for command in $(sed -n 's/^  mamba \([a-z]*\)  *.*/\1/p' "$dir/help" | grep -v '^models$' | sort -u); do
    "$mamba" help "$command" > "$dir/a" 2>&1 && "$mamba" "$command" --help > "$dir/b" 2>&1 &&
        cmp -s "$dir/a" "$dir/b" && grep -q '^mamba ' "$dir/a" && ! grep -qE '.{101}' "$dir/a"
    check "mamba help $command" "$dir/a"
done
answers "did you mean \`mamba help train\`" help tran
answers "\`mamba help\` lists all" help nothing
answers "one too many" help train eval

"$mamba" help --man > "$dir/mamba.1" && grep -q '^\.SH NAME' "$dir/mamba.1" &&
    [ "$(grep -c '^\.SS' "$dir/mamba.1")" -eq "$(grep -c '^  mamba [a-z]*  *[a-z]' "$dir/help")" ] &&
    grep -qF 'B \-\-held\-out' "$dir/mamba.1"
check "the man page has all commands"
grep -qx 'mamba train \\-o out.bin \\-\\-resume .*' "$dir/mamba.1" &&
    awk '/^\.nf/ { keeps = 1 } /^\.fi/ { keeps = 0 } /^mamba train/ && !keeps { bad = 1 }
        END { exit bad }' "$dir/mamba.1"
check "each form of a command has its line"
if command -v groff > /dev/null; then
    groff -man -Tutf8 -ww "$dir/mamba.1" > "$dir/out" 2> "$dir/err" && [ ! -s "$dir/err" ]
    check "the man page without a warning" "$dir/err"
else skip "the man page without a warning" "no groff"; fi

"$mamba" help --bash > "$dir/completion"
# completes WANTED WORDS: the completions of the last word have WANTED
completes() {
    wanted=$1
    shift
    bash -c '. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mamba
        printf "%s\n" "${COMPREPLY[@]}"' - "$dir/completion" "$@" > "$dir/out" 2> "$dir/err" &&
        grep -qxF -- "$wanted" "$dir/out" && [ ! -s "$dir/err" ]
    check "completion of '$*': $wanted" "$dir/err"
}
if command -v bash > /dev/null; then
    completes train mamba tr
    completes quantize mamba help q
    completes --held-out-data mamba train --held
    completes --verify mamba info $m --v
    completes wsd mamba train --schedule ""
    completes induction mamba eval $m --task i
    completes mean mamba logits $m x --pool m
    completes bf16 mamba bench --dtype b
    completes q4 mamba quantize $m out.bin q
    completes --show-selection mamba $m --sho
else skip "completion" "no bash"; fi

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
