# single.awk: one C file without includes of our own. `make single` runs
#   awk -f dev/single.awk LICENSE mamba.c > mamba_single.c
# Each line `#include "FILE"` is replaced by the file, as the preprocessor does it: FILE is relative
# to the file that includes it, and a file that is included twice stands there twice. A file with
# `#pragma once` comes in once. The first argument becomes a comment on top.

function expand(file, folder,    line, name, status) {
    if (depth > 20) fatal(file ": includes itself")
    folder = file
    if (!sub(/[^\/]*$/, "", folder)) folder = ""
    while ((status = (getline line < file)) > 0) {
        if (line ~ /^[ \t]*#[ \t]*pragma[ \t]+once/) {
            if (file in seen) break
            seen[file] = 1
        } else if (line ~ /^[ \t]*#[ \t]*include[ \t]*"/) {
            name = line
            sub(/^[^"]*"/, "", name)
            sub(/".*/, "", name)
            print "// ---- begin of " name
            depth++
            expand(folder name)
            depth--
            print "// ---- end of " name
        } else print line
    }
    if (status < 0) fatal(file ": cannot be read")
    close(file)
}

function fatal(message) {
    print "single.awk: " message > "/dev/stderr"
    failed = 1
    exit 1
}

BEGIN {
    if (ARGC != 3) fatal("usage: awk -f dev/single.awk LICENSE mamba.c")
    print "/* mamba.c in one file, written by `make single`. Do not edit; edit its parts.\n"
    while ((getline line < ARGV[1]) > 0) print line
    print "*/\n"
    expand(ARGV[2])
    exit failed
}
