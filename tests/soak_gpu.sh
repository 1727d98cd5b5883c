#!/bin/sh
# Two processes of some threads each use one GPU: prompts, batches, scores and training, mixed.
# Every text must be the one that was made alone.
#   sh tests/soak_gpu.sh [SECONDS] [THREADS]     300 and 2 by default
# It runs what `make tests/soak_gpu CUDA=1` built.
cd "$(dirname "$0")/.." || exit 2
seconds=${1:-300}
threads=${2:-2}
program=${SOAK:-tests/soak_gpu}
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
"$program" "$dir/alone" || { echo "soak: the work alone failed"; exit 1; }
"$program" "$dir/alone" "$seconds" "$threads" > "$dir/first" & first=$!
"$program" "$dir/alone" "$seconds" "$threads" > "$dir/second" & second=$!
wait $first; a=$?
wait $second; b=$?
cat "$dir/first" "$dir/second"
[ $a = 0 ] && [ $b = 0 ] && echo "soak: $seconds s, all as alone" && exit 0
echo "soak: exit status $a and $b"
exit 1
