#!/bin/sh
# tests/test_ranks.sh [all]: processes that meet as torchrun, mpirun, mpiexec and srun start them,
# exchange numbers, and end within seconds when one of them does. No GPU, no NCCL and none of these
# programs is needed: only the variables that they set. all: 20 kills at random moments.
# The last line is `N passed, N failed, N skipped`.
[ "$(uname)" = Linux ] || { echo "0 passed, 0 failed, 1 skipped"; exit 0; } # as NCCL
kills=4 first=0.3
[ "$1" = all ] && kills=20 first=0
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
ok()  { passed=$((passed + 1)); echo "ok   $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1"; [ -z "$2" ] || printf '     %s\n' "$2"; }
${CC:-cc} -O1 -std=gnu11 -Wall -Wextra -DMAMBA_NCCL tests/ranks.c -o "$dir/ranks" -lm -lpthread \
    2> "$dir/log" || { cat "$dir/log"; exit 1; }
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
export MAMBA_PATIENCE=6
port=$((21000 + $$ % 8000)) # another one for each run, as a job scheduler's

# begin FORM SIZE STEPS [HANGING]: ranks 0 to SIZE - 1 with the variables of FORM; rank HANGING
# stops at step 20. Without WITHOUT, which is not started. pids: theirs.
begin() {
    form=$1 size=$2 steps=$3 hanging=$4 pids= rank=0
    port=$((port + 1))
    rm -f "$dir"/out* "$dir"/err*
    while [ $rank -lt "$size" ]; do
        [ "$rank" = "$hanging" ] && hang=20 || hang=
        case $form in
        torchrun) set -- RANK=$rank WORLD_SIZE=$size LOCAL_RANK=$rank LOCAL_WORLD_SIZE=$size \
            MASTER_ADDR=localhost MASTER_PORT=$port TORCHELASTIC_RUN_ID=none ;;
        mpirun) set -- OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_SIZE=$size \
            OMPI_COMM_WORLD_LOCAL_RANK=$rank OMPI_COMM_WORLD_LOCAL_SIZE=$size MASTER_PORT=$port ;;
        mpiexec) set -- PMI_RANK=$rank PMI_SIZE=$size MPI_LOCALRANKID=$rank \
            MPI_LOCALNRANKS=$size MASTER_PORT=$port ;;
        srun) set -- SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=$size SLURM_LOCALID=$rank \
            SLURM_STEP_NUM_NODES=1 SLURM_JOB_ID=123$((port % 10000)) PMI_RANK=$rank \
            PMI_SIZE=$size ;;
        srun-hosts) set -- SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=$size SLURM_LOCALID=0 \
            SLURM_STEP_NUM_NODES=$size "SLURM_STEP_NODELIST=local[host-zz,1],other" \
            MASTER_PORT=$port ;;
        esac
        if [ "$rank" != "$WITHOUT" ]; then
            env "$@" "$dir/ranks" "$steps" $hang > "$dir/out$rank" 2> "$dir/err$rank" &
            pids="$pids $!"
        fi
        rank=$((rank + 1))
    done
}
# The statuses of all, a word each; seconds: how long that took.
finish() {
    begun=$(date +%s) statuses=
    for pid in $pids; do
        wait "$pid" 2> /dev/null
        statuses="$statuses $?"
    done
    seconds=$(($(date +%s) - begun))
}
nth() { shift "$1"; echo "$1"; } # nth N WORD ...: the Nth word

for form in torchrun mpirun mpiexec srun srun-hosts; do
    for size in 1 2 4; do
        begin $form $size 20
        finish
        if [ -z "$(printf %s "$statuses" | tr -d ' 0')" ] &&
            [ "$(cat "$dir"/out* | grep -c "of $size by ${form%-hosts} at")" = $size ]; then
            ok "$size ranks of $form meet and add up"
        else bad "$size ranks of $form meet and add up" "$(cat "$dir"/out* "$dir"/err*)"; fi
    done
done

# A rank is killed. All others end with a sentence, and one of them names it. 20 s: where it is
# killed before the others have met it, which they try for 3 times MAMBA_PATIENCE.
kill_one() { # kill_one SIGNAL VICTIM DELAY
    name="rank $2 of 3 gets SIG$1 after $3 s"
    begin torchrun 3 100000
    sleep "$3"
    victim=$(nth $(($2 + 1)) $pids)
    kill -s "$1" "$victim"
    [ "$1" = STOP ] && pids=$(for pid in $pids; do [ "$pid" = "$victim" ] || echo "$pid"; done)
    finish
    [ "$1" = STOP ] && { kill -s KILL "$victim"; wait "$victim" 2> /dev/null; }
    told=0
    for rank in 0 1 2; do
        [ $rank = "$2" ] || ! grep -q "rank $rank of 3: .*rank" "$dir/err$rank" ||
            told=$((told + 1))
    done
    cat "$dir"/err* | grep -Eq ": rank $2 |did not come to .*: $2\$" || told="$told, none names it"
    case $statuses in *" 0"*) told="$told, a status of 0" ;; esac
    if [ "$told" = 2 ] && [ $seconds -le 20 ]; then ok "$name: the others end in $seconds s"
    else bad "$name" "$told told, $seconds s: $(cat "$dir"/err*)"; fi
}
i=0
while [ $i -lt $kills ]; do
    delay=$(awk -v seed="$$$i" -v first="$first" \
        'BEGIN { srand(seed); printf "%.3f", first + rand() * 1.2 }')
    kill_one KILL $((i % 3)) "$delay"
    i=$((i + 1))
done
kill_one STOP 2 1
kill_one STOP 0 1
kill_one TERM 1 1

begin mpirun 3 100000 1
finish
if grep -q "rank 0 of 3: rank 1 on .* hangs" "$dir/err0" && grep -q "rank 1" "$dir/err2" &&
    [ $seconds -le 12 ]; then ok "a rank that hangs is named after $seconds s"
else bad "a rank that hangs is named" "$seconds s: $(cat "$dir"/err*)"; fi

WITHOUT=2 MAMBA_PATIENCE=2
begin mpirun 4 20
WITHOUT= MAMBA_PATIENCE=6
finish
if grep -q "did not come to port $port of this host: 2\$" "$dir/err0" &&
    grep -q "rank 3 of 4: rank 0" "$dir/err3"; then ok "who does not come is named"
else bad "who does not come is named" "$(cat "$dir"/err*)"; fi

refused() { # refused WORDS VARIABLES: a sentence with these words
    words=$1
    shift
    if env "$@" "$dir/ranks" 1 > /dev/null 2> "$dir/err"; then bad "$words" "it succeeded"
    elif grep -qF -- "$words" "$dir/err"; then ok "$words"
    else bad "$words" "$(cat "$dir/err")"; fi
}
refused "RANK='two' is not a number of ranks" RANK=two WORLD_SIZE=4
refused "RANK=4 is not a rank of WORLD_SIZE=4" RANK=4 WORLD_SIZE=4
refused "set MASTER_ADDR to its host (mpirun -x" OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 \
    OMPI_COMM_WORLD_LOCAL_SIZE=2
refused "rank 0 does not answer at localhost, port $port" RANK=1 WORLD_SIZE=2 \
    MASTER_ADDR=localhost MASTER_PORT=$port MAMBA_PATIENCE=1
if env SLURM_PROCID=0 SLURM_NTASKS=4 "$dir/ranks" 1 | grep -q "rank 0 of 1 by nobody"; then
    ok "a batch script of Slurm is no rank"
else bad "a batch script of Slurm is no rank"; fi

echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
