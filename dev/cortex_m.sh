#!/bin/sh
# dev/cortex_m.sh [MODEL]: runs a small model (tests/plain.bin) on an emulated microcontroller, a
# Cortex-M7, in 64 kB for all that it needs. Its text and logits must be those of ./mamba. Prints
# the flash and the RAM that it takes, with cpu/ and without. Debian: gcc-arm-none-eabi,
# libnewlib-arm-none-eabi, qemu-system-arm. The last line is `N passed, N failed, N skipped`.
cd "$(dirname "$0")/.." || exit 1
model=${1:-tests/plain.bin}
prompt='Once upon a time' tokens=100
passed=0 failed=0
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT

check() { # check NAME: whether the command before succeeded
    checked=$?
    if [ $checked -eq 0 ]; then passed=$((passed + 1)) && echo "ok   $1"
    else failed=$((failed + 1)) && echo "FAIL $1"; fi
    return $checked
}

# ./mamba's answer: the text, then the logits after it, in millionths.
./mamba "$model" "$prompt" -t 0 -n $tokens --no-echo --save-state "$dir/state" \
    > "$dir/want" 2> "$dir/err" || { cat "$dir/err"; exit 1; }
vocabulary=$(./mamba info "$model" | sed -n 's/.*vocab_size \([0-9]*\).*/\1/p')
od -An -v -t f4 -w4 -j 512 -N $((4 * vocabulary)) "$dir/state" |
    awk '{ printf "%.0f\n", $1 * 1e6 }' > "$dir/logits"
# The model, as an array in flash.
cat > "$dir/model.s" << END
.section .model, "a"
.balign 64
.global model_bin, model_bin_end
model_bin:
.incbin "$model"
model_bin_end:
END

for form in fast plain; do
    flags="-mcpu=cortex-m7 -mthumb -mfloat-abi=hard -mfpu=fpv5-sp-d16 -O2 -std=gnu11"
    flags="$flags -ffunction-sections -fdata-sections -fno-math-errno -ffp-contract=fast"
    [ $form = fast ] || flags="$flags -DPLAIN"
    # shellcheck disable=SC2086
    arm-none-eabi-gcc $flags -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-unused-function \
        -DPROMPT="\"$prompt\"" -DTOKENS=$tokens dev/cortex_m.c "$dir/model.s" -T dev/cortex_m.ld -nostartfiles \
        --specs=nosys.specs -Wl,--gc-sections -o "$dir/$form.elf" -lm > "$dir/build" 2>&1
    check "$form: builds without warnings" || { cat "$dir/build"; continue; }
    timeout 120 qemu-system-arm -M mps2-an500 -display none -monitor none -serial none \
        -chardev "file,id=out,path=$dir/out" -kernel "$dir/$form.elf" \
        -semihosting-config enable=on,target=native,chardev=out < /dev/null 2> "$dir/err"
    check "$form: runs to its end" || { tail -c 300 "$dir/out"; cat "$dir/err"; continue; }
    bytes=$(wc -c < "$dir/want")
    head -c "$bytes" "$dir/out" | cmp - "$dir/want"
    check "$form: the greedy text of ./mamba, $bytes bytes"
    sed -n 's/^logit //p' "$dir/out" | paste - "$dir/logits" | awk '
        { d = $1 - $2; if (d < 0) d = -d; if (!(d <= most)) most = d; n += NF == 2
          size = $2 < 0 ? -$2 : $2; if (size > largest) largest = size }
        END { printf "     logits: error %.1e of 1e-4\n", most / largest
              exit !(n > 0 && n == NR && most <= 1e-4 * largest) }'
    check "$form: the logits of ./mamba"
    of() { grep -a "^$1 " "$dir/out" | tail -n 1 | cut -d ' ' -f 2; }
    [ "$(of arena)" -lt 65536 ] && [ "$(of left)" -eq 0 ]
    check "$form: less than 64 kB of memory, all of it freed"
    arm-none-eabi-size -A "$dir/$form.elf" | awk -v form=$form -v arena="$(of arena)" \
        -v stack="$(of stack)" '
        /^\.(text|ARM.exidx|data)/ { code += $2 } /^\.model/ { model = $2 }
        /^\.(data|bss)/ { ram += $2 }
        END { printf "     %s: flash %d bytes of program and %d of model; RAM %d bytes: %d of " \
                  "the arena, %d of variables, %d of stack\n", form, code, model,
                  arena + ram - 65536 + stack, arena, ram - 65536, stack }'
done
echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
