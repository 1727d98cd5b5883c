#!/bin/sh
# tests/test_session.sh ./mamba: an interactive session as hands meet it, in a terminal that tmux
# plays. Keys go in, and the whole screen is compared with what it must show. The last line is
# `N passed, N failed, N skipped`.
mamba=$(cd "$(dirname "${1:-./mamba}")" && pwd)/$(basename "${1:-./mamba}")
model=models/tales.bin
passed=0 failed=0
if ! command -v tmux > /dev/null; then
    echo "skip the session: tmux is not installed"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
dir=$(mktemp -d) || exit 1
unset TMUX
# The session `keep` keeps the server alive.
t() { tmux -u -S "$dir/socket" -f /dev/null "$@"; }
trap 't kill-server 2> /dev/null; rm -rf "$dir"' EXIT

t new-session -d -s keep "exec sleep 1000"
t new-session -d -s main "exec sleep 1000"

ok()  { passed=$((passed + 1)); echo "ok   $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1"; }

# start ARGUMENTS: the program alone in a terminal of 60 x 12; what it returns is shown after it.
# The file wrap.sh keeps quoting out of tmux's command line.
start() {
    t kill-session -t main 2> /dev/null
    { echo "trap : INT; cd '$(pwd)'"; echo "$mamba $model $*"; echo 'echo "left $?"; exec sleep 1000'; } \
        > "$dir/wrap.sh"
    t new-session -d -s main -x 60 -y 12 "TERM=screen LC_ALL=C.UTF-8 sh $dir/wrap.sh"
    i=0
    while [ "$(screen | tail -n 1)" != ">" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
}
keys() { t send-keys -t main "$@"; }
text() { t send-keys -t main -l "$1"; }
screen() { t capture-pane -t main -p | sed 's/ *$//' | awk '{ line[NR] = $0; if ($0 != "") n = NR }
    END { for (i = 1; i <= n; i++) print line[i] }'; }
# shows NAME SCREEN: the screen becomes this one within ten seconds
shows() {
    i=0
    while [ "$(screen)" != "$2" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
    if [ $i -lt 100 ]; then ok "$1"
    else
        bad "$1"
        echo "     the screen:"; screen | sed 's/^/     |/'
        echo "     wanted:"; printf '%s\n' "$2" | sed 's/^/     |/'
    fi
}
# holds NAME WORDS: the screen comes to hold these words
holds() {
    i=0
    until screen | grep -qF -- "$2" || [ $i -ge 100 ]; do sleep 0.1; i=$((i + 1)); done
    if [ $i -lt 100 ]; then ok "$1"; else bad "$1"; screen | sed 's/^/     |/'; fi
}
# after FILE TEXT: what the model writes after the state in FILE and a text; FILE goes on
after() {
    [ -e "$1" ] && load="--load-state $1" || load=
    # shellcheck disable=SC2086
    "$mamba" $model "$2" $load -t 0 -n 5 --no-echo --save-state "$1" 2> /dev/null
}
options="-t 0 -n 5 --quiet"

# --- editing: the keys change the line, not the screen around it
start "$options"
shows "the prompt" ">"
text "One dey a dog"
keys Left Left Left Left Left Left Left BSpace
text "a"
keys C-e
text " ran"
shows "arrows, backspace, end of line" "> One day a dog ran"
keys C-a
text "So. "
keys M-f M-f C-w
shows "start, words, cut a word" "> So. One  a dog ran"
keys C-u
shows "cut to the start" ">  a dog ran"
keys C-k
text "日本語éx"
keys Left Left Left BSpace Right BSpace
shows "characters of two columns" "> 日éx"
keys C-u C-k
text "0123456789 123456789 223456789 323456789 423456789 523456789 end"
keys Home
text "X"
keys End
text "!"
shows "a text longer than a row" \
    "> X0123456789 123456789 223456789 323456789 423456789 523456
789 end!"
keys C-a C-k F5 M-x
shows "unknown keys print nothing" ">"

# --- turns, a newline, a paste
one=$(after "$dir/s" "One day a dog")
text "One day a dog"
keys Enter
shows "a turn" "> One day a dog
$one
>"
two=$(after "$dir/s" "
The cat
sat")
keys C-j
text "The cat"
keys M-Enter
text "sat"
shows "a newline by Ctrl-J and Alt-Enter" "> One day a dog
$one
>
  The cat
  sat"
keys Enter
shows "is part of the turn" "> One day a dog
$one
>
  The cat
  sat
$two
>"
keys Up
shows "history brings it back, lines and all" "> One day a dog
$one
>
  The cat
  sat
$two
>
  The cat
  sat"
keys Up Up Up
shows "the arrow goes through its lines first" "> One day a dog
$one
>
  The cat
  sat
$two
> One day a dog"
keys Down Down Down C-u C-k
start "$options"
shows "a new session" ">"
printf 'One day\r\na dog\nran\tto' | t load-buffer -b paste -
t paste-buffer -t main -p -r -b paste
shows "a paste waits, in lines" "> One day
  a dog
  ran   to"
rm -f "$dir/s"
one=$(after "$dir/s" "One day
a dog
ran	to")
keys Enter
shows "and is one turn" "> One day
  a dog
  ran   to
$one
>"
seq 1 40 | tr '\n' ',' | sed 's/,/, line\n/g' | t load-buffer -b long -
t paste-buffer -t main -p -b long
holds "a paste higher than the screen shows its end" "40, line"
keys C-c
holds "which Ctrl-C drops" "^C"

# --- undo over three turns
start "$options"
rm -f "$dir/s"
one=$(after "$dir/s" "One day a dog") two=$(after "$dir/s" " The cat")
three=$(after "$dir/s" " The mouse")
for line in "One day a dog" " The cat" " The mouse"; do text "$line"; keys Enter; done
shows "three turns" "> One day a dog
$one
>  The cat
$two
>  The mouse
$three
>"
keys C-l
for i in 1 2 3 4; do text "/undo"; keys Enter; done
shows "/undo over three turns" "> /undo
undone: back to $("$mamba" $model "One day a dog" -t 0 -n 5 --save-state "$dir/u" 2>&1 \
    > /dev/null | sed -n 's/state after \([0-9]*\) .*/X/p' | sed "s/X/$(
    after "$dir/v" "One day a dog" > /dev/null; after "$dir/v" " The cat" > /dev/null
    "$mamba" $model "" --load-state "$dir/v" -n 0 --save-state "$dir/v" 2>&1 |
    sed -n 's/state after \([0-9]*\) .*/\1/p')/") tokens
> /undo
undone: back to $("$mamba" $model "" --load-state "$dir/u" -n 0 --save-state "$dir/u" 2>&1 |
    sed -n 's/state after \([0-9]*\) .*/\1/p') tokens
> /undo
undone: back to 0 tokens
> /undo
nothing to undo
>"
keys C-l
text "One day a dog"
keys Enter
shows "and the first turn again" "> One day a dog
$one
>"

# --- Ctrl-C and Ctrl-D
start "-t 0 -n -1 --ignore-eos --save-state $dir/saved"
text "One day"
keys Enter
i=0
while [ "$(screen | tail -n 1)" = "> One day" ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i + 1)); done
keys C-c
holds "Ctrl-C while writing stops it" "(interrupted)"
keys "/set n 3" Enter
holds "and the session goes on" "settings  n 3, t 0,"
text "half a line"
keys C-c
holds "Ctrl-C drops a line" "> half a line^C"
[ ! -e "$dir/saved" ]
keys C-c
holds "and asks in an empty one" "Ctrl-C again leaves"
keys C-l
text "x"
keys BSpace C-c
shows "after other keys it drops the line" "> ^C
>"
keys C-c
shows "then asks again" "> ^C
> ^C
Ctrl-C again leaves; so do Ctrl-D and /quit
>"
keys C-c
holds "twice leaves" "left 0"
if [ -s "$dir/saved" ]; then ok "and the state is saved"; else bad "and the state is saved"; fi
start "$options --load-state $dir/saved"
keys "/status" Enter
holds "it can be loaded: /status" "state     "
text "text"
keys C-a C-d
shows "Ctrl-D cuts in a line" "$(screen | sed '$d')
> ext"
keys C-u C-k C-d
holds "and leaves from an empty one" "left 0"
rm -f "$dir/saved"
start "$options --save-state $dir/saved"
shows "a session that will be hung up" ">"
text "One day"
keys Enter
holds "has written" "$(after "$dir/w" "One day")"
t kill-session -t main 2> /dev/null
i=0
while [ ! -s "$dir/saved" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
if [ -s "$dir/saved" ]; then ok "its state is saved"; else bad "its state is saved"; fi

# --- the terminal changes its size under a line
start "$options"
text "0123456789 123456789 223456789 323456789 423456789 5234567"
shows "a line that fills its row" "> 0123456789 123456789 223456789 323456789 423456789 5234567"
keys Left
t resize-window -t main -x 30 -y 12
text "z"
shows "narrower" "> 0123456789 123456789 2234567
89 323456789 423456789 523456z
7"
t resize-window -t main -x 60 -y 12
keys End
text "!"
shows "wider again" "> 0123456789 123456789 223456789 323456789 423456789 523456z
7!"

# --- around the text
start "-t 0 -n 5"
keys "One day" Enter
i=0
until screen | grep -q "tokens/s" || [ $i -ge 100 ]; do sleep 0.1; i=$((i + 1)); done
line=$(screen | grep -n "^prefill\|^load" | head -n 1 | cut -d: -f1)
if [ "${line:-0}" -gt 1 ]; then ok "the timing has a line of its own"
else bad "the timing has a line of its own"; screen; fi
t kill-session -t main 2> /dev/null
t new-session -d -s main -x 60 -y 12 "TERM=screen; export TERM; cd '$(pwd)'; $mamba $model 'One dog ran' \
--show-selection; NO_COLOR=1 $mamba $model 'One dog ran' --show-selection; exec sleep 1000"
holds "--show-selection" "mean delta of all layers"
i=0
until [ "$(screen | wc -l)" -ge 5 ] || [ $i -ge 100 ]; do sleep 0.1; i=$((i + 1)); done
if t capture-pane -t main -p -e | head -n 1 | grep -q '48;5;'; then ok "in colours"; else bad "in colours"; fi
if screen | tail -n 1 | grep -q '^[0-9][0-9]* *0\.[0-9]* *[a-z ]*$' &&
    ! t capture-pane -t main -p -e | tail -n 10 | grep -q '48;5;.*ran'; then ok "NO_COLOR: lines"
else bad "NO_COLOR: lines"; screen; fi
printf 'One dog\n' > "$dir/read"
rm -f "$dir/s"
one=$(after "$dir/s" "One dog")
start "$options"
keys "/read $dir/read" Enter
shows "/read FILE" "> /read $dir/read
$one
>"
keys C-l
keys "/read models/none" Enter
shows "/read of nothing" "> /read models/none
mamba: models/none: No such file or directory
>"
keys C-l
keys "/set t hot" Enter "/set x 1" Enter "/seed 7" Enter "/seed" Enter "/quot" Enter
shows "/set, /seed and wrong ones" "> /set t hot
mamba: -t needs a number, not 'hot'
> /set x 1
mamba: /set knows n, t, p, k, min-p and repeat-penalty, not
'x'
> /seed 7
> /seed
seed      7
> /quot
unknown command '/quot' (try /help; // begins a text with /)
>"

echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
