// --- files that are written whole or not at all
// A NewFile is written under a temporary name in the folder of its target, then renamed to the
// target. At every moment the target is the old file or the whole new one. The temporary has a
// random name and is created exclusively: no other file is opened, and two programs that write the
// same target do not meet. A target that is a link stays a link: the file that it names is
// replaced, as if the link had been opened for writing. The mode of an existing target is kept.

typedef struct {
    const char *path; // as the caller gave it; lives until commit or discard
    char *target;     // path with its links followed
    char *temporary;  // NULL: the file is not replaced but written in place (a device, a pipe)
    FILE *f;
} NewFile;

enum { TEMPORARIES = 8 };
// The names of temporaries that exist now: main's signal handler removes them.
static char *volatile temporaries[TEMPORARIES];

static void exchange_temporary(char *from, char *to) {
#pragma omp critical(new_files)
    for (int i = 0; i < TEMPORARIES; i++)
        if (temporaries[i] == from) {
            temporaries[i] = to;
            break;
        }
}

// Closes f, after everything has reached the disk if sync is set: 0, or -1 with errno set.
static int close_file(FILE *f, bool sync) {
    errno = 0;
    int bad = fflush(f) || ferror(f);
    bad = bad || (sync && sync_file(f));
    int why = errno;
    if (fclose(f) && !bad) return -1;
    errno = why ? why : EIO; // an earlier write failed and its reason is no longer known
    return bad ? -1 : 0;
}

// Whether path is nothing yet, or a regular file that this program does not have as its stdout or
// stderr. Rename would put a new file in the place of /dev/null too, and `-o /dev/stdout > file`
// would lose what is printed.
static bool is_replaceable(const char *path) {
    FileInfo info, own;
    if (!file_info(path, &info)) return true;
    for (int fd = 1; fd <= 2; fd++)
        if (stream_info(fd, &own) && own.device == info.device && own.inode == info.inode)
            return false;
    return info.regular;
}

// The name of the file that path leads to, malloc'd; the file need not exist. NULL after fail().
static char *follow_links(const char *path) {
    char *name = malloc(strlen(path) + 1);
    if (!name) {
        fail("out of memory: the name of %s", path);
        return NULL;
    }
    strcpy(name, path);
#ifdef MAMBA_POSIX
    char to[4096];
    ssize_t n;
    for (int links = 0; (n = readlink(name, to, sizeof to)) >= 0; links++) {
        char *slash = strrchr(name, '/');
        size_t folder = slash && to[0] != '/' ? (size_t)(slash + 1 - name) : 0;
        char *next = malloc(folder + (size_t)n + 1);
        bool bad = !next || links == 40 || n == (ssize_t)sizeof to;
        if (bad) fail("cannot write %s: its links do not lead to a file", path);
        else {
            memcpy(next, name, folder);
            memcpy(next + folder, to, (size_t)n);
            next[folder + (size_t)n] = 0;
        }
        free(name);
        name = next;
        if (bad) {
            free(name);
            return NULL;
        }
    }
#endif
    return name;
}

// A name beside target, such as out.bin.1f0c93aa.tmp, malloc'd; another one for each attempt. NULL
// after fail().
static char *temporary_name(const char *target, int attempt) {
    size_t end = strlen(target), base = end, room = end + 16;
    while (base && target[base - 1] != '/' && target[base - 1] != '\\') base--;
    if (end - base > 200) { // a file's name has at most 255 bytes
        end = base + 200;
        while (end > base && ((unsigned char)target[end] & 0xC0) == 0x80) end--; // within UTF-8
    }
    char *name = malloc(room);
    uint64_t random = (uint64_t)time(NULL);
    random = random_u64(&random) ^ (uint64_t)clock() ^ (uint64_t)attempt << 32;
    random = random_u64(&random) ^ (uint64_t)(uintptr_t)&random;
#ifdef MAMBA_POSIX
    random = random_u64(&random) ^ (uint64_t)getpid();
#endif
    if (!name) {
        fail("out of memory: the name of %s", target);
        return NULL;
    }
    snprintf(name, room, "%.*s.%08x.tmp", (int)end, target, (unsigned)(random_u64(&random) >> 32));
    return name;
}

// Closes and removes what was written; the target stays as it was.
static void new_file_discard(NewFile *w) {
    if (w->f) fclose(w->f);
    if (w->f && w->temporary) remove(w->temporary);
    if (w->f && w->temporary) exchange_temporary(w->temporary, NULL);
    free(w->temporary);
    free(w->target);
    memset(w, 0, sizeof *w);
}

#ifdef MAMBA_POSIX
// Gives fd the mode of the file that it will replace, and its owner where that is allowed. Without
// the group, the group's rights go too: they were not given to another group.
static void keep_mode(int fd, const struct stat *old) {
    struct stat now;
    mode_t mode = old->st_mode & 0777;
    if (fstat(fd, &now)) return;
    if ((now.st_uid != old->st_uid || now.st_gid != old->st_gid) &&
        fchown(fd, old->st_uid, old->st_gid) && fchown(fd, (uid_t)-1, old->st_gid) &&
        now.st_gid != old->st_gid)
        mode &= ~(mode_t)070;
    fchmod(fd, mode); // fails on file systems without modes, which lose nothing
}
#endif

// Opens w->f to write what path will hold. in_place: a device or a pipe is allowed too, and is
// appended to as it is. 0, or -1 after fail().
static int new_file_open(NewFile *w, const char *path, bool in_place) {
    unsigned mode = 0666;
    memset(w, 0, sizeof *w);
    w->path = path;
    if (!is_replaceable(path)) {
        if (!in_place)
            return fail("cannot write %s: not a regular file, or this program's stdout", path);
        w->f = fopen(path, "ab");
        return w->f ? 0 : fail("cannot write %s: %s", path, strerror(errno));
    }
    if (!(w->target = follow_links(path))) return -1;
#ifdef MAMBA_POSIX
    struct stat old;
    bool exists = stat(w->target, &old) == 0;
    if (exists) mode = old.st_mode & 0777;
#endif
    for (int attempt = 0; attempt < 100 && !w->f; attempt++) {
        free(w->temporary);
        if (!(w->temporary = temporary_name(w->target, attempt))) break;
        if (!(w->f = create_file(w->temporary, mode))) {
            fail("cannot write %s: %s", path, strerror(errno));
            if (errno != EEXIST) break;
        }
    }
    if (!w->f) {
        new_file_discard(w);
        return -1;
    }
    exchange_temporary(NULL, w->temporary);
#ifdef MAMBA_POSIX
    if (exists) keep_mode(fileno(w->f), &old);
#endif
    return 0;
}

// Finishes the file and puts it in the target's place. 0, or -1 after fail(): the target stays as
// it was.
static int new_file_commit(NewFile *w) {
    FILE *f = w->f;
    bool bad = close_file(f, w->temporary != NULL) != 0;
    if (!bad && w->temporary) bad = replace_file(w->temporary, w->target) != 0;
    if (bad) fail("cannot write %s: %s", w->path, strerror(errno));
    if (bad && w->temporary) remove(w->temporary);
    if (w->temporary) exchange_temporary(w->temporary, NULL);
    w->f = NULL;
    new_file_discard(w);
    return bad ? -1 : 0;
}

typedef struct { // of a file
    const void *data;
    size_t bytes;
} Piece;

// A whole file from its pieces. 0, or -1 after fail(), an older file untouched.
static int write_pieces(const char *path, const Piece *piece, int n) {
    NewFile w;
    if (new_file_open(&w, path, false)) return -1;
    for (int i = 0; i < n; i++)
        if (piece[i].bytes && fwrite(piece[i].data, 1, piece[i].bytes, w.f) != piece[i].bytes) {
            fail("cannot write %s: %s", path, strerror(errno));
            new_file_discard(&w);
            return -1;
        }
    return new_file_commit(&w);
}
