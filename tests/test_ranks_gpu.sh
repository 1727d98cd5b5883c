#!/bin/sh
# tests/test_ranks_gpu.sh ./mamba GPUS [KILLS [speed]]: training by several processes, one a GPU, of
# a build with NCCL=1 (doc/TRAINING.md). Losses and files against those of one GPU, a resume on
# another number, ranks that are killed; `speed`: tokens/s of 1, 2 ... GPUS, and memory of 2.8B.
# The last line is `N passed, N failed, N skipped`.
mamba=$1 gpus=$2 kills=${3:-6} speed=$4
case $mamba in /*) ;; *) mamba=$(pwd)/$mamba ;; esac
root=$(pwd)
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
ok()  { passed=$((passed + 1)); echo "ok   $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1"; [ -z "$2" ] || printf '     %s\n' "$2"; }
cp README.md mamba.c "$dir"
cd "$dir" || exit 1
port=$((21000 + $$ % 8000))

# start RANKS ARGUMENTS of train: in the background; pids. finish: their statuses, and seconds.
start() {
    ranks=$1 rank=0 pids=
    shift
    port=$((port + 1))
    while [ $rank -lt "$ranks" ]; do
        RANK=$rank WORLD_SIZE=$ranks LOCAL_RANK=$rank LOCAL_WORLD_SIZE=$ranks MASTER_PORT=$port \
            "$mamba" train "$@" > /dev/null 2> err$rank &
        pids="$pids $!"
        rank=$((rank + 1))
    done
}
finish() {
    begun=$(date +%s) statuses=
    for pid in $pids; do
        wait "$pid" 2> /dev/null
        statuses="$statuses $?"
    done
    seconds=$(($(date +%s) - begun))
}
run() { # run NAME RANKS ARGUMENTS
    name=$1
    shift
    start "$@"
    finish
    [ -z "$(printf %s "$statuses" | tr -d ' 0')" ] && return 0
    bad "$name: statuses$statuses" "$(tail -n 2 err?)"
    return 1
}
# close NAME A B TOLERANCE: the losses of two logs, from step to step, relative
close() {
    cut -d, -f4 "$2" | sed 1d > a
    cut -d, -f4 "$3" | sed 1d > b
    worst=$(paste a b | awk '{ d = $1 - $2; if (d < 0) d = -d; d /= $1; if (d > w) w = d }
                             END { print NR ? w + 0 : 9 }')
    if awk -v w="$worst" -v t="$4" 'BEGIN { exit !(w <= t) }'; then ok "$1: $worst relative"
    else bad "$1" "$worst relative"; fi
}

model="${MODEL:---d-model 256 --layers 6} --length ${LENGTH:-256} --batch 16 --eval-every 10"
# A rate at which the loss falls from step to step. Where it leaps (--lr 3e-3 --warmup 4), bf16's
# rounding grows: there one GPU in two passes differs from itself by 2e-3.
small="--data mamba.c $model --steps 20 --warmup 10 --lr 1e-3 --schedule constant"
"$mamba" train -o one.bin $small 2> err || bad "one GPU" "$(cat err)"
"$mamba" train -o one32.bin $small --float32 2> err || bad "one GPU, float32" "$(cat err)"
for ranks in 1 2 4 8; do
    [ $ranks -le "$gpus" ] || break
    run "$ranks ranks" $ranks -o r$ranks.bin $small &&
        close "20 losses of $ranks ranks and of one GPU" one.bin.csv r$ranks.bin.csv 1e-3
    run "$ranks ranks, float32" $ranks -o f$ranks.bin $small --float32 &&
        close "the same in float32" one32.bin.csv f$ranks.bin.csv 1e-4
    run "$ranks ranks again" $ranks -o again.bin $small --force && cmp -s r$ranks.bin again.bin &&
        ok "$ranks ranks twice: the same bits" || bad "$ranks ranks twice: the same bits"
    run "$ranks ranks, two passes a step" $ranks -o acc.bin $small --accumulate 2 --force &&
        close "two passes a step" one.bin.csv acc.bin.csv 1e-3
    "$mamba" info r$ranks.bin --verify > /dev/null 2> err && ok "info --verify" ||
        bad "info --verify" "$(cat err)"
    # Ten steps by so many ranks, ten more by one GPU; and the other way round.
    half=$(echo "$small" | sed 's/--steps 20/--steps 10/')
    run "ten steps" $ranks -o half.bin $half --force &&
        "$mamba" train -o half.bin --resume --steps 20 2> err &&
        close "$ranks ranks, then one GPU" one.bin.csv half.bin.csv 1e-3
    "$mamba" train -o back.bin $half --force 2> err &&
        run "ten more steps" $ranks -o back.bin --resume --steps 20 &&
        close "one GPU, then $ranks ranks" one.bin.csv back.bin.csv 1e-3
done

# Ranks are killed at random moments. The others end within 60 s; --save-every steps are lost.
ranks=$gpus
[ "$ranks" -gt 1 ] || kills=0
i=0
while [ $i -lt "$kills" ]; do
    if [ -e k.bin.train ]; then start "$ranks" -o k.bin --resume
    else start "$ranks" -o k.bin $(echo "$small" | sed 's/--steps 20/--steps 100000/') \
        --save-every 20; fi
    victim=$((i % ranks))
    sleep "$(awk -v s="$$$i" 'BEGIN { srand(s); printf "%.2f", 2 + rand() * 6 }')"
    signal=KILL
    [ $((i % 3)) = 2 ] && signal=STOP
    struck=$(echo $pids | cut -d' ' -f$((victim + 1)))
    kill -s $signal "$struck"
    [ $signal = STOP ] && pids=$(for p in $pids; do [ "$p" = "$struck" ] || echo "$p"; done)
    finish
    kill -s KILL "$struck" 2> /dev/null
    wait "$struck" 2> /dev/null
    lost=0
    [ -e k.bin.train ] && lost=$(($(tail -n 1 k.bin.csv | cut -d, -f1) -
        $(od -An -tu8 -j16 -N8 k.bin.train)))
    told=$(grep -l "mamba: rank.*rank $victim" err? | grep -vc "err$victim")
    if [ $seconds -le 60 ] && [ "$told" -ge 1 ] && [ $lost -le 20 ]; then
        ok "rank $victim gets SIG$signal: the others end in $seconds s, $lost steps are lost"
    else bad "rank $victim gets SIG$signal" \
        "$seconds s, $lost lost, told $told: $(tail -n 1 err?)"; fi
    i=$((i + 1))
done
if [ "$ranks" -gt 1 ]; then
    start "$ranks" -o int.bin $(echo "$small" | sed 's/--steps 20/--steps 100000/')
    sleep 8
    kill -s INT "$(echo $pids | cut -d' ' -f2)"
    finish
    [ -z "$(printf %s "$statuses" | tr -d ' 0')" ] && [ -e int.bin.train ] &&
        ok "Ctrl-C at rank 1: all stop and rank 0 saves, $seconds s" ||
        bad "Ctrl-C at rank 1" "$statuses: $(tail -n 2 err?)"
fi

# Speeds: no run is finished, so that nothing large is written. In the log, steps and seconds.
if [ "$speed" = speed ]; then
    cc -O2 -w -fopenmp "$root/tests/random_model.c" -o random_model -I"$root" -lm
    awk 'BEGIN { srand(1); for (i = 0; i < 400000; i++) print int(rand() * 50000) }' > ids
    for shape in "130M 768 24 8 60" "370M 1024 48 8 30" "2.8B 2560 64 1 6"; do
        set -- $shape
        name=$1 batch=$4 steps=$5 base=
        ./random_model m.bin "$2" "$3" 50280 || continue
        for ranks in 1 2 4 8; do
            [ $ranks -le "$gpus" ] || break
            start $ranks -o s.bin --force --from m.bin --data ids --ids --length 2048 \
                --batch $((ranks * batch)) --steps 100000 --eval-every 100000 --save-every 100000
            begun=$(date +%s)
            while [ $(($(date +%s) - begun)) -lt 240 ] && kill -0 $pids 2> /dev/null &&
                [ "$(cat s.bin.csv 2> /dev/null | wc -l)" -le "$steps" ]; do sleep 0.5; done
            kill -s KILL $pids 2> /dev/null
            finish
            awk -F, -v first=$((steps / 2)) -v base="$base" -v what="$name, $ranks GPUs" '
                $1 == first { t = $2; s = $3 }
                $1 > first { T = $2; S = $3 }
                END { if (S > s) { r = (T - t) / (S - s); if (!base) base = r
                          printf "     %s: %d tokens/s, %.2f times\n", what, r, r / base } }' \
                s.bin.csv | tee line
            base=${base:-$(sed 's/.*: \([0-9]*\) tokens.*/\1/' line)}
            grep "GB in use" err0 || tail -n 2 err?
            rm -f s.bin*
        done
    done
fi
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
