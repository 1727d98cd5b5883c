#!/bin/sh
# tests/test_train.sh ./mamba [all]: training as a user meets it. Nothing is ever lost: a run killed
# at any moment goes on from its checkpoint to the same bits. The last line is
# `N passed, N failed, N skipped`.
mamba=${1:-./mamba}
case $mamba in /*) ;; *) mamba=$(pwd)/$mamba ;; esac
everything=$2
root=$(pwd)
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0

ok()   { passed=$((passed + 1)); echo "ok   $1"; }
bad()  { failed=$((failed + 1)); echo "FAIL $1"; [ -z "$2" ] || printf '     %s\n' "$2"; }
same() { if [ "$2" = "$3" ]; then ok "$1"; else bad "$1" "got [$2], want [$3]"; fi; }
same_file() { if cmp -s "$2" "$3"; then ok "$1"; else bad "$1" "$2 and $3 differ"; fi; }
fails() { # fails NAME WORD ARGUMENTS of train
    name=$1 word=$2
    shift 2
    if "$mamba" train "$@" > "$dir/out" 2> "$dir/err" < /dev/null; then bad "$name" "it succeeded"
    elif grep -qF -- "$word" "$dir/err"; then ok "$name"
    else bad "$name" "stderr: $(cat "$dir/err")"; fi
}

cp "$root/README.md" "$dir/text"
cp "$root/models/tales.bin" "$dir/tales.bin"
cd "$dir" || exit 1
small="--data text --steps 24 --batch 4 --length 40 --d-model 24 --layers 2 --d-state 5 \
    --save-every 3 --eval-every 8 --warmup 4"

"$mamba" train -o whole.bin $small -T 1 2> err && ok "a run" || bad "a run" "$(cat err)"
"$mamba" train -o two.bin $small -T 2 2> /dev/null
same_file "any number of threads trains the same bits" two.bin whole.bin
"$mamba" train -o seed.bin $small -s 2 2> /dev/null
if cmp -s seed.bin whole.bin; then bad "another seed, other weights"
else ok "another seed, other weights"; fi
for s in 1 2; do # the windows that a seed draws must not be another seed's, one draw later
    "$mamba" train -o draw$s.bin --from whole.bin --data text --lr 0 --min-lr 0 --batch 1 \
        --length 30 --steps 8 -s $s 2> /dev/null
    sed 1d draw$s.bin.csv | cut -d, -f4 | sort > draw$s
done
[ -s draw1 ] && [ -z "$(comm -12 draw1 draw2)" ] && ok "seeds draw different windows" \
    || bad "seeds draw different windows" "$(comm -12 draw1 draw2 | tr '\n' ' ')"
"$mamba" train -o acc.bin $small --accumulate 2 2> /dev/null
loss() { tail -n 1 "$1" | cut -d, -f4; }
awk -v a="$(loss acc.bin.csv)" -v b="$(loss whole.bin.csv)" \
    'BEGIN { d = a - b; exit !(d < 1e-3 && d > -1e-3) }' \
    && ok "accumulation gives the same losses" \
    || bad "accumulation gives the same losses" "$(loss acc.bin.csv) and $(loss whole.bin.csv)"
"$mamba" train -o grownchunk.bin $small --grow-from 10 --chunk 20 2> err
grep -q "40 tokens in chunks of 20" err && ok "chunks hold where the length grows" \
    || bad "chunks hold where the length grows" "$(cat err)"
"$mamba" train -o chunk.bin $small --chunk 7 2> err
grep -q "chunks of 7" err && awk -v a="$(loss chunk.bin.csv)" -v b="$(loss whole.bin.csv)" \
    'BEGIN { d = a - b; exit !(d < 1e-3 && d > -1e-3) }' \
    && ok "chunks give the same losses" \
    || bad "chunks give the same losses" "$(loss chunk.bin.csv) and $(loss whole.bin.csv)"
[ "$(wc -l < whole.bin.csv | tr -d ' ')" = 25 ] && ok "the log has a line a step" \
    || bad "the log has a line a step"
"$mamba" info whole.bin --verify > /dev/null 2> err && ok "info --verify of what was trained" \
    || bad "info --verify of what was trained" "$(cat err)"
"$mamba" whole.bin "The " -n 5 -t 0 > out 2> err && ok "it writes" || bad "it writes" "$(cat err)"
"$mamba" eval whole.bin text > out 2> err && ok "it can be evaluated" \
    || bad "it can be evaluated" "$(cat err)"
# a token is a byte
head -c 2501 text > long; head -c 1000 text > p1; head -c 2000 text | tail -c 1000 > p2
tail -c +2001 long > p3
for p in p1 p2 p3; do "$mamba" eval whole.bin $p --each 2> /dev/null; done > a.each
"$mamba" eval whole.bin long --context 1000 --each > b.each 2> err \
    && same_file "eval --context is eval of each piece" b.each a.each \
    || bad "eval --context" "$(cat err)"
head -c 2001 text > long # the last byte alone is not predicted
same "its counts" "$("$mamba" eval whole.bin long --context 1000 2> /dev/null | sed -n 1p)" \
    "tokens         2001 (1998 predicted)"
"$mamba" eval whole.bin long --context 1 > out 2> err && bad "--context 1" "it succeeded" \
    || ok "--context 1 is refused"
"$mamba" eval whole.bin --task copying --length 50 --context 40 > out 2> err \
    && bad "--context with --task" "it succeeded" || ok "--context with --task is refused"
first=$(sed -n 2p whole.bin.csv | cut -d, -f4)
awk -v a="$first" -v b="$(loss whole.bin.csv)" 'BEGIN { exit !(b < a - 0.5 && a < 6) }' \
    && ok "the loss falls: $first to $(loss whole.bin.csv)" \
    || bad "the loss falls" "$first to $(loss whole.bin.csv)"

# --- resume
"$mamba" train -o part.bin $small 2> err & # interrupted
pid=$!
i=0
while [ ! -s part.bin.train ] && [ $i -lt 3000 ]; do sleep 0.02; i=$((i + 1)); done
kill -INT $pid 2> /dev/null
wait $pid
status=$?
[ $status -eq 0 ] && ok "SIGINT saves and leaves" \
    || bad "SIGINT saves and leaves" "status $status, $(cat err)"
"$mamba" train -o part.bin $small --resume 2> err || bad "resume" "$(cat err)"
same_file "a run interrupted and resumed" part.bin whole.bin
cut -d, -f1,4,5 part.bin.csv > a.csv; cut -d, -f1,4,5 whole.bin.csv > b.csv
same_file "its log is that of the whole run" a.csv b.csv

# --- resume alone: the settings are in the checkpoint
wait_for() { # wait_for FILE: until it is there and not empty
    i=0
    while [ ! -s "$1" ] && [ $i -lt 3000 ]; do sleep 0.02; i=$((i + 1)); done
}
"$mamba" train -o alone.bin $small 2> err &
pid=$!
wait_for alone.bin.train
kill -INT $pid 2> /dev/null
wait $pid
"$mamba" train -o alone.bin --resume 2> err || bad "resume alone" "$(cat err)"
same_file "--resume alone knows the settings" alone.bin whole.bin
"$mamba" train -o alone.bin --resume 2> err
same "--resume of a finished run: status 0, it stays" "$? $(cksum < alone.bin)" \
    "0 $(cksum < whole.bin)"
grep -q "finished, after 24 steps" err && ok "and a line says so" || bad "and a line says so" \
    "$(cat err)"
fails "settings hold, or are named" "decay 0.2" -o alone.bin --resume --decay 0.2
fails "a finished cosine run: what can be done" "finished run of 24 steps: --from alone.bin -o NEW" \
    -o alone.bin --from alone.bin --data text --steps 3
fails "another schedule is named by its name" "has schedule cosine, this one has schedule constant (" \
    -o alone.bin --resume --schedule constant --steps 1000
fails "a cosine run is not made longer" "--from alone.bin -o NEW" -o alone.bin --resume --steps 48
fails "nor shorter than it is" "schedule" -o alone.bin --resume --steps 12
"$mamba" train -o long.bin $small --schedule constant --steps 30 2> err
"$mamba" train -o longer.bin $small --schedule constant 2> err
"$mamba" train -o longer.bin --resume --steps 30 2> err || bad "longer" "$(cat err)"
same_file "--resume --steps MORE: the bits of a run that planned them" longer.bin long.bin
"$mamba" train -o longer.bin --resume 2> err || bad "longer, again" "$(cat err)"
same_file "and it knows its new last step" longer.bin long.bin
rm longer.bin*
"$mamba" train -o longer.bin $small --schedule wsd --steps 100000 2> err & # its rate never falls
pid=$!
wait_for longer.bin.train
i=0 # beyond the warm-up
while [ "$(wc -l < longer.bin.csv)" -lt 12 ] && [ $i -lt 1200 ]; do sleep 0.05; i=$((i + 1)); done
kill -INT $pid # as timeout does: one to the process, one to its group
sleep 0.01
kill -INT $pid 2> /dev/null
wait $pid
status=$?
[ $status -eq 0 ] && ok "two SIGINTs at once save, too" || bad "two SIGINTs at once save, too" "$status"
steps=$(($(tail -n 1 longer.bin.csv | cut -d, -f1) * 5 / 4 + 1))
"$mamba" train -o long.bin $small --schedule wsd --steps $steps --force 2> err
"$mamba" train -o longer.bin --resume --steps $steps 2> err || bad "wsd" "$(cat err)"
same_file "the same of wsd, to $steps steps" longer.bin long.bin
fails "fewer steps than were taken" "has taken $steps steps" -o longer.bin --resume --steps 2
"$mamba" train -o longer.bin --resume --steps $((steps + 20)) 2> err
grep -q "goes back up" err && ok "a finished wsd run can go on, and says how" \
    || bad "a finished wsd run can go on" "$(cat err)"

# --- a name that holds something
fails "a finished run is not replaced" "--force" -o whole.bin $small
fails "one that can go on" "finished run of $((steps + 20)) steps: --resume --steps MORE" -o \
    longer.bin $small
fails "the checkpoint's name for the model's" "has no .train: -o whole.bin --resume" -o \
    whole.bin.train --resume
fails "no run" "there is no run to resume: none.bin.train" -o none.bin --resume
cp tales.bin taken.bin
fails "another model is not replaced" "taken.bin exists" -o taken.bin $small
same_file "it stays" taken.bin tales.bin
echo "notes" > note.train
fails "nor a file that is no checkpoint" "note.train is in the way" -o note $small
"$mamba" train -o taken.bin $small --force 2> err || bad "--force" "$(cat err)"
same_file "--force replaces" taken.bin whole.bin
rm -f taken.bin* note.train

# --- two runs of one name
"$mamba" train -o shared.bin $small --steps 100000 2> err1 &
pid=$!
wait_for shared.bin.train
fails "a second run of one name" "process $pid" -o shared.bin $small --force
fails "or a resumed one" "process $pid" -o shared.bin --resume
kill -KILL $pid
wait $pid 2> /dev/null
[ -e shared.bin.lock ] && ok "a killed run leaves its lock file" || bad "the lock file"
touch stamp
"$mamba" train -o shared.bin --resume 2> err &
pid=$!
i=0 # SIGINT is ignored until the run has begun and writes its log
while [ -z "$(find shared.bin.csv -newer stamp)" ] && [ $i -lt 400 ]; do
    sleep 0.02
    i=$((i + 1))
done
sleep 0.3
kill -INT $pid
wait $pid && ok "and nobody waits for it" || bad "and nobody waits for it" "$(cat err)"
[ -e shared.bin.lock ] && bad "the lock file goes" || ok "the lock file goes"
echo mine > kept.bin.lock
fails "a file where the lock should be" "in the way" -o kept.bin $small
same "it stays" "$(cat kept.bin.lock)" mine
rm -f shared.bin*

# --- small texts, other encodings
head -c 1000 text > little
"$mamba" train -o little.bin --data little --steps 3 --d-model 16 --layers 1 --batch 2 2> err
tail -c 100 little > end # what is held out, less than a window of 256
want=$("$mamba" eval little.bin end 2> /dev/null | awk '/mean_nll/ { print $2 }')
awk -v a="$(tail -n 1 little.bin.csv | cut -d, -f5)" -v b="$want" \
    'BEGIN { d = a - b; exit !(a > 1 && d < 2e-5 && d > -2e-5) }' \
    && ok "a small text has held-out losses: those of eval" \
    || bad "a small text's held-out loss" "$(tail -n 1 little.bin.csv), eval $want"
grep -q -- "--length or --held-out-data" err && ok "and a line says what would be better" \
    || bad "and a line" "$(cat err)"
{ printf '\357\273\277'; cat text; } > marked
"$mamba" train -o marked.bin ${small#--data text} --data marked 2> err
same_file "a byte-order mark is left out" marked.bin whole.bin
grep -q "byte-order mark" err && ok "and named" || bad "and named" "$(cat err)"
wide() { head -c 600 text | sed "s/./&$1/g" | tr '@' '\000'; } # ASCII with zeros between
{ printf '\377\376'; wide @; } > utf16
fails "UTF-16" "iconv" -o x.bin --data utf16
"$mamba" eval whole.bin utf16 > out 2> err && bad "eval of UTF-16" "it succeeded" \
    || grep -q iconv err && ok "eval of UTF-16" || bad "eval of UTF-16" "$(cat err)"
printf '\377\376\010\233\200\377\376\010\233' > sound # no text: any bytes can be learnt
"$mamba" train -o sound.bin --data sound --data text --steps 1 --length 20 --d-model 8 --layers 1 \
    2> err && ok "bytes that begin like UTF-16" || bad "bytes that begin like UTF-16" "$(cat err)"

# --- documents: the loss and the gradient of a row are those of the document alone
printf 'Once there was a cat. Q: what? A: a mouse.<|endoftext|>' > d1
printf 'The dog ran home, Q: who? A: the dog did, and it slept.<|endoftext|>' > d2
printf 'A bird. Q: where? A: in a tree.<|endoftext|>' > d3
cat d1 d2 d3 > docs
for d in 1 2 3; do # what the model of --from makes of each, by eval
    "$mamba" eval tales.bin d$d 2> /dev/null | awk '/predicted/ { n = substr($3, 2) }
        /mean_nll/ { printf "%.4f\n", $2; }'
done | sort > by_eval
one="--from tales.bin --documents --lr 0 --min-lr 0 --batch 1 --length 64 --held-out 0"
"$mamba" train -o docs.bin --data docs $one --steps 40 2> err
grep -q "3 documents, 3 rows" err && ok "documents end with their end-of-text token" \
    || bad "documents" "$(cat err)"
sed 1d docs.bin.csv | cut -d, -f4 | awk '{ printf "%.4f\n", $1 }' | sort -u > by_train
same_file "--documents: the loss of a row is that of its document alone" by_train by_eval
"$mamba" train -o files.bin --data d1 --data d2 --data d3 $one --steps 40 2> err
sed 1d files.bin.csv | cut -d, -f4 | awk '{ printf "%.4f\n", $1 }' | sort -u > by_train
same_file "documents end with their file" by_train by_eval
for d in 1 2 3; do
    "$mamba" train -o alone$d.bin --data d$d $one --steps 1 2> err
    sed 1d alone$d.bin.csv | cut -d, -f4,7
done | sort > alone
sed 1d docs.bin.csv | cut -d, -f4,7 | sort -u > together
same_file "its gradient has the length of that of the document alone" together alone
"$mamba" train -o padded.bin --data d1 $one --steps 1 --length 200 2> err # more of it is masked
awk -v a="$(sed -n 2p padded.bin.csv | cut -d, -f7)" -v b="$(sed -n 2p alone1.bin.csv |
    cut -d, -f7)" 'BEGIN { d = a - b; exit !(a > 0 && d < 2e-4 * a && d > -2e-4 * a) }' \
    && ok "what is masked adds nothing" || bad "what is masked" "$(cat padded.bin.csv)"
"$mamba" train -o pieces.bin --data d2 $one --steps 30 --length 8 2> err
grep -q "1 documents, 3 rows" err && ok "a long document is cut into pieces" \
    || bad "a long document" "$(cat err)"
for d in 1 2 3; do # the losses after "A:" alone, from those of each token
    "$mamba" tokenize tales.bin d$d > ids
    "$mamba" eval tales.bin d$d --each 2> /dev/null > nlls
    k=0 text="" # the first token that begins after "A:"
    while read -r id; do
        case $text in *"A:"*) break ;; esac
        text=$text$(echo "$id" | "$mamba" tokenize tales.bin --decode)
        k=$((k + 1))
    done < ids
    tail -n +$k nlls | awk '{ s += $1 } END { printf "%.4f\n", s / NR }'
done | sort > by_eval
"$mamba" train -o mask.bin --data docs $one --steps 40 --mask-until "A:" 2> err
sed 1d mask.bin.csv | cut -d, -f4 | awk '{ printf "%.4f\n", $1 }' | sort -u > by_train
same_file "--mask-until: only what follows counts" by_train by_eval
printf 'no answer here<|endoftext|>' > d4
"$mamba" train -o mask4.bin --data docs --data d4 $one --steps 2 --mask-until "A:" 2> err
grep -q "does not occur in 1 documents" err && ok "a document without it is left out, and counted" \
    || bad "a document without it" "$(cat err)"
fails "a mask that occurs nowhere" "occurs in no document" -o x.bin --data d4 $one --mask-until "A:"
fails "a mask without documents" "--documents" -o x.bin --data docs --mask-until "A:"
fails "documents of a task" "--task" -o x.bin --task copying --documents
"$mamba" train -o heldd.bin --data docs ${one% --held-out 0} --held-out-data d1 --steps 3 2> err
awk -v a="$(tail -n 1 heldd.bin.csv | cut -d, -f5)" -v b="$(sed -n 2p alone1.bin.csv |
    cut -d, -f4)" 'BEGIN { d = a - b; exit !(a > 0 && d < 1e-4 && d > -1e-4) }' \
    && ok "held-out documents" || bad "held-out documents" "$(cat heldd.bin.csv err)"
"$mamba" train -o docs.bin --resume --steps 50 2> err
grep -q "cosine" err && ok "documents and settings" || bad "documents and settings" "$(cat err)"
fails "documents differ" "documents 3 in 3 rows" -o docs.bin --resume --mask-until "A:"

# --- carry: windows one after another
head -c 301 text > walk # one stretch of three windows
walk="--data walk --carry --held-out 0 --batch 1 --length 100 --d-model 16 --layers 2"
"$mamba" train -o walk0.bin $walk --steps 1 2> err
"$mamba" train -o walk.bin $walk --from walk0.bin --lr 0 --min-lr 0 --steps 5 2> err \
    || bad "carry" "$(cat err)"
grep -q "300 tokens in 3 steps" err && ok "carry says what a stretch is" || bad "carry" "$(cat err)"
want=$("$mamba" eval walk0.bin walk 2> /dev/null | awk '/mean_nll/ { print $2 }')
awk -F, -v want="$want" 'NR > 1 { loss[NR - 1] = $4 }
    END { d = (loss[1] + loss[2] + loss[3]) / 3 - want
          exit !(want > 1 && d < 2e-5 && d > -2e-5 && loss[4] == loss[1] && loss[5] == loss[2]) }' \
    walk.bin.csv && ok "carry: the windows have the losses of eval over the text, lap after lap" \
    || bad "carry: losses" "$(cut -d, -f4 walk.bin.csv | tr '\n' ' '), eval $want"
head -c 281 text > short # the last window has 80 targets; the rest of it does not count
"$mamba" train -o short.bin ${walk#--data walk} --data short --from walk0.bin --lr 0 --min-lr 0 \
    --steps 3 2> err
want=$("$mamba" eval walk0.bin short 2> /dev/null | awk '/mean_nll/ { print $2 }')
awk -F, -v want="$want" 'NR > 1 { loss[NR - 1] = $4 }
    END { d = (100 * loss[1] + 100 * loss[2] + 80 * loss[3]) / 280 - want
          exit !(want > 1 && d < 2e-5 && d > -2e-5) }' short.bin.csv \
    && ok "carry: the end of a stretch" || bad "carry: the end" "$(cat short.bin.csv), eval $want"
carry="$small --carry --accumulate 2 --chunk 16"
"$mamba" train -o carry.bin $carry 2> err || bad "carry" "$(cat err)"
"$mamba" train -o carried.bin $carry 2> err &
pid=$!
wait_for carried.bin.train
kill -INT $pid
wait $pid
"$mamba" train -o carried.bin --resume 2> err || bad "carry, resumed" "$(cat err)"
same_file "carry, interrupted and resumed" carried.bin carry.bin
cut -d, -f1,4,5 carried.bin.csv > a.csv; cut -d, -f1,4,5 carry.bin.csv > c.csv
same_file "its log is that of the whole run" a.csv c.csv
fails "a run without carry does not go on with it" "this one has carry, it has not" -o whole.bin \
    $small --resume --carry
fails "carry of a task" "--task" -o x.bin --task copying --carry
fails "carry of documents" "--documents" -o x.bin --data text --carry --documents
fails "carry of a growing length" "--grow-from" -o x.bin --data text --carry --grow-from 32
fails "stretches shorter than a window" "fewer than --length 100" -o x.bin ${walk% --length*} \
    --length 100 --batch 4

# --- noise in what is read
"$mamba" train -o quiet.bin $small --noise 0 2> err || bad "--noise 0" "$(cat err)"
same_file "--noise 0 is a run without it" quiet.bin whole.bin
noisy="$small --noise 0.2"
"$mamba" train -o noisy.bin $noisy -T 1 2> err || bad "--noise" "$(cat err)"
if cmp -s noisy.bin whole.bin; then bad "--noise trains other weights"
else ok "--noise trains other weights"; fi
"$mamba" train -o noised.bin $noisy --save-every 1 2> err &
pid=$!
wait_for noised.bin.train
kill -INT $pid
wait $pid
"$mamba" train -o noised.bin --resume 2> err || bad "--noise, resumed" "$(cat err)"
same_file "--noise, interrupted and resumed, with more threads" noised.bin noisy.bin
fails "a run without noise does not go on with it" "this one has noise 0.2, it has not" \
    -o whole.bin $small --resume --noise 0.2
fails "nor with other noise" "it has noise 0.2, this one has noise 0.3" -o noisy.bin $small \
    --resume --noise 0.3
fails "more noise than tokens" "--noise" -o x.bin --data text --noise 1.5
still="--data text --from whole.bin --lr 0 --min-lr 0 --steps 1 --batch 2 --length 40"
"$mamba" train -o still.bin $still 2> err
"$mamba" train -o loud.bin $still --noise 0.9 2> err
same "the held-out text has no noise" "$(cut -d, -f5 loud.bin.csv)" "$(cut -d, -f5 still.bin.csv)"
awk -v a="$(loss loud.bin.csv)" -v b="$(loss still.bin.csv)" 'BEGIN { exit !(b > 1 && a > b) }' \
    && ok "what is trained on has" || bad "what is trained on has" "$(cat loud.bin.csv)"

# --- a held-out file: a run on the rest of the text is, to the bit, the run that holds out as much
# at its end
bytes=$(wc -c < text) held=$(($(wc -c < text) / 10))
head -c $((bytes - held)) text > learnt; tail -c $held text > held
apart="--data learnt --held-out-data held ${small#--data text}"
"$mamba" train -o apart.bin $apart 2> err || bad "a held-out file" "$(cat err)"
same_file "a held-out file" apart.bin whole.bin
cut -d, -f1,4,5 apart.bin.csv > a.csv
same_file "its held-out losses are those of the same text held out at the end" a.csv b.csv
head -c 1000 text > other
fails "resume with another held-out file" "another run" -o apart.bin --data learnt \
    --held-out-data other ${small#--data text} --resume
fails "a held-out file that is trained on" "is trained on" -o x.bin --data text --data held \
    --held-out-data held
fails "a held-out file too short for a window" "--held-out-data other" -o x.bin --data learnt \
    --held-out-data other --length 1000
fails "no such held-out file" "no-such" -o x.bin --data text --held-out-data no-such
fails "a held-out file and a share" "--held-out" -o x.bin --data learnt --held-out-data held \
    --held-out 0.2
fails "a held-out file of a task" "--task" -o x.bin --task copying --held-out-data held

grown="--task induction --steps 24 --batch 2 --length 64 --grow-from 8 --d-model 16 --layers 1 \
    --save-every 5 --eval-every 8"
"$mamba" train -o grown.bin $grown -T 1 2> err || bad "a growing length" "$(cat err)"
"$mamba" train -o cut.bin $grown 2> err &
pid=$!
i=0
while [ ! -s cut.bin.train ] && [ $i -lt 3000 ]; do sleep 0.02; i=$((i + 1)); done
kill -INT $pid 2> /dev/null
wait $pid
"$mamba" train -o cut.bin $grown --resume 2> err || bad "resume" "$(cat err)"
same_file "a growing length, interrupted and resumed" cut.bin grown.bin
"$mamba" train -o flat.bin --task induction --steps 6 --batch 16 --length 8 --d-model 16 \
    --layers 1 2> err
# 4 lengths: 6 steps each
cut -d, -f4 grown.bin.csv | sed -n 2,7p > a.csv; cut -d, -f4 flat.bin.csv | sed -n 2,7p > b.csv
same_file "its first steps are those of short sequences" a.csv b.csv

kills=${KILLS:-3}
[ "$everything" = all ] && [ -z "$KILLS" ] && kills=20
k=0 wrong=0
while [ $k -lt $kills ]; do
    rm -f killed.bin*
    "$mamba" train -o killed.bin $small 2> /dev/null &
    pid=$!
    # anywhere in the run: a different hundredth of a second each time
    sleep "0.$(awk -v k=$k 'BEGIN { srand(k + 11); printf "%03d", int(rand() * 400) }')"
    kill -KILL $pid 2> /dev/null
    wait $pid 2> /dev/null
    if [ -s killed.bin.train ]; then "$mamba" train -o killed.bin $small --resume 2> err
    else "$mamba" train -o killed.bin $small 2> err; fi
    cmp -s killed.bin whole.bin || { wrong=$((wrong + 1)); cat err; }
    k=$((k + 1))
done
rm -f killed.bin.*.tmp # of the last one, where it was killed while it saved
[ $wrong -eq 0 ] && ok "killed $kills times anywhere, always the same bits in the end" \
    || bad "killed $kills times" "$wrong times other bits"

# --- from a model, its vocabulary, tasks
"$mamba" train -o tuned.bin --from tales.bin --data text --steps 2 --batch 1 --length 20 2> err \
    && "$mamba" tuned.bin "Once" -n 3 > out 2>> err && ok "fine-tuning a bf16 model" \
    || bad "fine-tuning a bf16 model" "$(cat err)"
"$mamba" train -o vocabulary.bin --tokenizer tales.bin --data text --steps 2 --batch 1 --length 20 \
    --d-model 16 --layers 1 2> err && "$mamba" tokenize vocabulary.bin text > a.ids \
    && "$mamba" tokenize tales.bin text > b.ids \
    && same_file "another model's vocabulary" a.ids b.ids \
    || bad "another model's vocabulary" "$(cat err)"
for task in induction copying; do
    "$mamba" train -o $task.bin --task $task --steps 3 --batch 2 --length 40 --d-model 16 \
        --layers 1 2> err \
        && "$mamba" eval $task.bin --task $task --length 100 --samples 50 > out 2>> err \
        && grep -q "^length 100  accuracy" out && ok "task $task" || bad "task $task" "$(cat err)"
    for threads in 1 2 3; do # sequences are shared out, three to two or to fewer than threads
        for samples in 2 3 7; do
            "$mamba" eval $task.bin --task $task --length 1100 --samples $samples -T $threads \
                | sed 's/).*/)/'
        done > eval$threads
    done
    cmp -s eval1 eval2 && cmp -s eval1 eval3 \
        && [ "$(grep -c "of [0-9]*, 95% interval" eval1)" = 3 ] \
        && ok "eval --task $task by 1, 2 and 3 threads" \
        || bad "eval --task $task by threads" "$(cat eval1 eval2 eval3)"
done
for way in "" --recurrent; do # the models that ship, by the scan and by the recurrence
    for task in induction copying; do
        "$mamba" eval "$root/models/$task.bin" --task $task --length 600 --samples 12 $way \
            2>> err | sed "s/, 95.*//"
    done
done > ways
[ "$(sort -u ways | wc -l)" = 2 ] && grep -q "100.00%  (12 of 12" ways \
    && ok "induction and copying by scan and by recurrence" \
    || bad "by scan and by recurrence" "$(cat ways)"
"$mamba" eval whole.bin long --recurrent > out 2> err \
    && bad "--recurrent with a text" "it succeeded" || ok "--recurrent with a text is refused"

# --- files: no output is an input or another output
unharmed() { # unharmed NAME WORD FILE ARGUMENTS of train: refused with WORD, FILE stays
    name=$1 word=$2 file=$3
    shift 3
    cp "$file" before
    fails "$name" "$word" "$@"
    same_file "$name: the file stays" "$file" before
}
tiny="--steps 2 --batch 1 --length 20 --d-model 8 --layers 1"
cp text d.csv; cp text b.txt; cp text c.train; cp tales.bin m.bin; cp text f.csv
unharmed "the log takes the data's name" \
    "the log d.csv: that is the text of --data; choose another name for -o" d.csv -o d --data \
    d.csv $tiny
unharmed "the checkpoint takes the data's name" \
    "the checkpoint c.train: that is the text of --data" c.train -o c --data c.train $tiny
unharmed "the model onto the data" "-o b.txt: that is the text of --data; choose another name" \
    b.txt -o b.txt --data text --data b.txt $tiny
unharmed "the log onto the data" "--log b.txt: that is the text of --data" b.txt -o x.bin --data \
    b.txt --log b.txt $tiny
unharmed "the log onto the held-out data" "--log b.txt: that is the text of --held-out-data" \
    b.txt -o x.bin --data text --held-out-data b.txt --log b.txt $tiny
unharmed "the log onto the model of --from" "--log m.bin: that is the model of --from" m.bin -o \
    x.bin --from m.bin --data text --log m.bin $tiny
unharmed "the log onto the vocabulary" "--log m.bin: that is the file of --tokenizer" m.bin -o \
    x.bin --tokenizer m.bin --data text --log m.bin $tiny
unharmed "the model onto the vocabulary" "-o m.bin: that is the file of --tokenizer" m.bin -o \
    m.bin --tokenizer m.bin --data text $tiny
"$mamba" train -o b.txt --data - $tiny < b.txt 2> err
same "the model onto the data on stdin: status 1, it stays" "$? $(cksum < b.txt)" \
    "1 $(cksum < text)"
fails "the log onto the new model" "--log ./x.bin: that is also -o" -o x.bin --data text --log \
    ./x.bin $tiny
fails "the log onto the checkpoint" "that is also the checkpoint" -o x.bin --data text --log \
    x.bin.train $tiny
mkdir folder
ln -s folder folder2
fails "two outputs of one name in one folder" "that is also -o" -o folder/x --data text --log \
    folder2/x $tiny
fails "a held-out file that is trained on, by another path" "is trained on" -o x.bin --data text \
    --held-out-data ./text $tiny
fails "an empty output" "-o needs a file name" -o "" --data text $tiny
fails "an empty log" "--log needs a file name" -o x.bin --data text --log "" $tiny
fails "a log in no folder" "no/such" -o x.bin --data text --log no/such/log $tiny
fails "a folder as the log" "folder" -o x.bin --data text --log folder $tiny
same "nothing was written by them" "$(ls x.* .train .csv *.tmp 2> /dev/null)" ""
"$mamba" train -o m.bin --from m.bin --data text $tiny 2> err \
    && "$mamba" info m.bin | grep -q "in f32" && ok "fine-tuning in place" \
    || bad "fine-tuning in place" "$(cat err)"
printf 'day,sum\n1,2\n' > sales.csv
unharmed "the log onto a table" "the log sales.csv: that holds something else, not a training log; \
choose another name for -o" sales.csv -o sales --data text $tiny
cp tales.bin k.bin
unharmed "the log onto a model" "--log k.bin: that holds a model, not a training log" k.bin -o x.bin \
    --data text --log k.bin $tiny
cp text k.txt
unharmed "the model onto a text" "k.txt exists and is no model: another -o" k.txt -o k.txt --data \
    text $tiny
"$mamba" train -o said.bin --data text $tiny --steps 5 --eval-every 3 2> err
same "wrote" "$(tail -n 1 err)" "wrote said.bin, said.bin.train and said.bin.csv"
same "the held-out loss stands where it is new" "$(tr '\r' '\n' < err | grep "held-out" |
    cut -d' ' -f2 | tr '\n' ' ')" "3/5 5/5 "
"$mamba" train -o silent.bin --data text $tiny --quiet > out 2> err
same "train --quiet" "$? $(cat out err)" "0 "
"$mamba" eval silent.bin text --quiet > out 2> err
same "eval --quiet" "$? $(cat err) $(grep -c . out)" "0  4"
cp tales.bin i.bin.tmp
"$mamba" train -o i.bin --from i.bin.tmp --data text $tiny 2> err
same_file "--from out.bin.tmp stays" i.bin.tmp tales.bin

# --- the log: lost, it is an error, and the model is saved all the same
if [ -c /dev/full ]; then
    ln -s /dev/full full.csv
    "$mamba" train -o full.bin $small --log full.csv 2> err
    same "a log on a full disk: the status" $? 1
    same_file "a log on a full disk: the model is saved" full.bin whole.bin
    same "a log on a full disk: a sentence" "$(tail -n 1 err)" "mamba: full.csv: No space left on \
device: the log is not complete; full.bin and full.bin.train are saved and whole"
fi
"$mamba" train -o piped.bin $small --log /dev/fd/1 2> err | cat > piped.csv
cut -d, -f1,4,5 piped.csv > a.csv; cut -d, -f1,4,5 whole.bin.csv > b.csv
same_file "a log to a pipe" a.csv b.csv
cp part.bin.csv f.csv
yes "1,a line of step one" | head -n 60000 >> f.csv
cp f.csv before
(ulimit -f 1000; "$mamba" train -o part.bin $small --resume --log f.csv 2> err)
status=$?
same_file "a log that cannot be rewritten stays" f.csv before
[ $status -ne 0 ] && grep -q "cannot write f.csv" err && ok "and a sentence says so" \
    || bad "and a sentence says so" "status $status, $(cat err)"
"$mamba" train -o part.bin $small --resume --log part.bin.csv 2> err \
    || bad "resume of a finished run" "$(cat err)"
slow="--data text --steps 1000 --batch 8 --length 200 --d-model 64 --layers 2 --warmup 4"
slow="$slow --save-every 1 --eval-every 1000"
"$mamba" train -o slow.bin $slow 2> err &
pid=$!
i=0
while [ "$(cat slow.bin.csv 2> /dev/null | wc -l)" -lt 5 ] \
    && [ $i -lt 1200 ]; do sleep 0.05; i=$((i + 1)); done
kill -INT $pid
wait $pid
lines=$(wc -l < slow.bin.csv)
for k in 1 2 3; do # kill -9 right after a resumed run's first checkpoint
    cp slow.bin.train before
    "$mamba" train -o slow.bin $slow --resume 2> err &
    pid=$!
    i=0
    while cmp -s slow.bin.train before && [ $i -lt 6000 ]; do sleep 0.01; i=$((i + 1)); done
    kill -9 $pid
    wait $pid 2> /dev/null
    now=$(wc -l < slow.bin.csv)
    [ "$now" -gt "$lines" ] && ok "killed after a resume: $lines lines of the log are $now" \
        || bad "killed after a resume" "$lines lines of the log are $now"
    lines=$now
done
rm -f slow.bin.*.tmp
: > empty.csv
"$mamba" train -o slow.bin $slow --steps 1 --log empty.csv --force 2> err
same "a new log replaces an empty one" "$(wc -l < empty.csv | tr -d ' ')" 2
same "no temporary stays" "$(ls -a | grep -c 'tmp$')" 1 # i.bin.tmp

# --- errors
fails "no output" "-o" --data text
fails "nothing to learn" "--data or --task" -o x.bin
fails "no such text" "no-such" -o x.bin --data no-such
fails "a text too short" "--length" -o x.bin --data text --length 1000000
fails "an unknown task" "--task" -o x.bin --task juggling
fails "a task too short" "--length" -o x.bin --task copying --length 20
fails "a first length that does not double to the last" "--grow-from" -o x.bin --task copying \
    --length 100 --grow-from 32
fails "a first length too short" "--grow-from" -o x.bin --task copying --length 64 --grow-from 16
fails "accumulate does not divide" "--accumulate" -o x.bin --data text --batch 3 --accumulate 2
fails "a pass too large" "--accumulate" -o x.bin --data text --batch 65536 --length 16000000
fails "an unknown schedule" "--schedule" -o x.bin --data text --schedule linear
"$mamba" train -o wsd.bin --data text --steps 10 --batch 1 --length 20 --d-model 8 --layers 1 \
    --warmup 2 --lr 1e-2 --min-lr 1e-3 --schedule wsd 2> err
[ "$(cut -d, -f6 wsd.bin.csv | sed 1d | tr "\n" " ")" = \
    "0.005 0.01 0.01 0.01 0.01 0.01 0.01 0.01 0.0055 0.001 " ] && ok "warm-up, stable, decay" \
    || bad "warm-up, stable, decay" "$(cut -d, -f6 wsd.bin.csv | tr "\n" " ")"
fails "an unwritable folder" "no/such" -o no/such/x.bin --data text --steps 1
fails "resume without a checkpoint" "x.bin.train" -o x.bin $small --resume
cp part.bin.train y.bin.train
fails "resume of another run" "another run" -o y.bin $small --lr 0.5 --resume
head -c 5000 part.bin.train > z.bin.train
fails "a truncated checkpoint" "z.bin.train" -o z.bin $small --resume
cp part.bin.train w.bin.train
printf 'XXXX' | dd of=w.bin.train bs=1 seek=60000 conv=notrunc 2> /dev/null
fails "a damaged checkpoint" "damaged" -o w.bin $small --resume
cp part.bin.train before.train
"$mamba" train -o part.bin $small --lr 1e30 --clip 0 --resume 2> err
same_file "a refused run leaves the checkpoint whole" part.bin.train before.train
"$mamba" train -o nan.bin --data text --steps 50 --batch 2 --length 40 --d-model 16 --layers 1 \
    --lr 10 --clip 0 --decay 10 --warmup 0 --save-every 1 2> err
status=$?
if [ $status -eq 0 ] || grep -q "not finite" err; then ok "divergence is named, or survived"
else bad "divergence" "$(cat err)"; fi

echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
