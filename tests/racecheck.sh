#!/bin/sh
# tests/racecheck.sh ./mamba [racecheck|memcheck ...]: generation, batches, sampling, a prompt and
# training under compute-sanitizer, of a build with the GPU backend; every form of the step, bf16,
# q8 and q4. racecheck fails in cuBLAS's own kernels, so there the products are plain loops
# (plain_blas.cu). It does not follow __syncwarp, so build with make cuda NVCC='nvcc -DRELEASERS=32'
# (cuda/exchange.cuh). With the variable below it takes a fraction of the time. Eight runs at a time.
# The last line is `N passed, N failed, 0 skipped`.
export NV_COMPUTE_SANITIZER_RACECHECK_INDIRECT_BARRIER_TRACKING=1
mamba=$1
shift
case $mamba in /*) ;; *) mamba=$(pwd)/$mamba ;; esac
cd "$(dirname "$0")/.." || exit 2
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
cc -O2 -w -fopenmp tests/random_model.c -o "$dir/random_model" -I. -lm &&
    "$dir/random_model" "$dir/bf16.bin" 768 2 5000 bf16 &&
    "$mamba" quantize "$dir/bf16.bin" "$dir/q8.bin" q8 > "$dir/out" 2>&1 &&
    "$mamba" quantize "$dir/bf16.bin" "$dir/q4.bin" q4 > "$dir/out" 2>&1 &&
    nvcc -O2 -std=c++17 -arch=native -Xcompiler -fPIC -shared -o "$dir/plain_blas.so" \
        tests/plain_blas.cu -lcublas || exit 2
ids=$(seq 3 42 | tr '\n' ' ')

check() { # check NAME COMMAND ...
    name="$which: $1"
    shift
    [ "$which" = racecheck ] && plain=$dir/plain_blas.so || plain=
    while [ "$(find "$dir" -name '*.runs' | wc -l)" -ge 8 ]; do sleep 0.2; done
    touch "$dir/$name.runs"
    (
        log="$dir/$name.log"
        LD_PRELOAD=$plain timeout 300 "$tool" --tool "$which" "$@" > "$log" 2>&1
        status=$?
        if [ $status = 0 ] && grep -qE 'SUMMARY: 0 (errors|hazards)' "$log"; then
            echo "ok   $name"
        else
            echo "FAIL $name: status $status"
            grep -E '^(=====|mamba:)' "$log" | head -n 30
            touch "$log.failed"
        fi
        rm "$dir/$name.runs"
    ) &
}
for which in ${*:-racecheck memcheck}; do
    for type in bf16 q8 q4; do
        generate="$mamba $dir/$type.bin"
        for form in "" portable; do
            export MAMBA_PORTABLE=$form
            [ -n "$form" ] || unset MAMBA_PORTABLE
            set -- --ids --ignore-eos -s 1
            check "$type $form one" $generate "$ids" "$@" -n 4
            check "$type $form one top-k" $generate "$ids" "$@" -n 4 -k 40
            check "$type $form five" $generate "$ids" "$@" -n 3 --samples 5
            check "$type $form twenty" $generate "$ids" "$@" -n 3 --samples 20 -k 40
        done
    done
    check prompt "$mamba" eval models/tales.bin LICENSE
    check train "$mamba" train -o "$dir/$which.bin" --data README.md --d-model 128 --layers 2 \
        --length 256 --batch 4 --steps 3 --eval-every 100
done
wait
all=$(find "$dir" -name '*.log' | wc -l) failed=$(find "$dir" -name '*.failed' | wc -l)
echo "$((all - failed)) passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
