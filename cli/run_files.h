// cli/run_files.h - the files of a training run: the lock that keeps two runs apart, what its name
// may hold already, and the log.
//
// Depends on cli/options.h (read_stream, same_file), files/new_file.h and the API.

// --- the lock: one run at a time writes out.bin
// The system holds it for the process, so that of a killed run is free. Its file goes with the run.

typedef struct {
    char *path; // NULL: not taken
    int fd;
} RunLock;

static void run_lock_release(RunLock *lock) {
#ifdef MAMBA_POSIX
    if (lock->path) {
        remove(lock->path); // before it is free, so that nobody else's is removed
        exchange_temporary(lock->path, NULL);
        close(lock->fd);
    }
#endif
    free(lock->path);
    lock->path = NULL;
}

#ifdef MAMBA_POSIX
// One attempt. 0; 1 to try again, where the file went meanwhile; -1 after fail().
static int run_lock_try(RunLock *lock, const char *out) {
    struct stat mine, named;
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    lock->fd = open(lock->path, O_RDWR | O_CREAT, 0666);
    if (lock->fd < 0) return fail("cannot write %s: %s", lock->path, strerror(errno));
    if (fcntl(lock->fd, F_SETLK, &whole)) {
        const bool held = errno == EACCES || errno == EAGAIN;
        if (held && fcntl(lock->fd, F_GETLK, &whole) == 0 && whole.l_type != F_UNLCK)
            fail("%s: another run, process %ld, is writing it: wait for that one, or choose "
                 "another -o",
                 out, (long)whole.l_pid);
        else if (held) fail("%s: another run is writing it: choose another -o", out);
        close(lock->fd);
        if (held) return -1;
        lock->fd = open(lock->path, O_RDONLY); // a file system without locks
        return 0;
    }
    if (fstat(lock->fd, &mine) == 0 && mine.st_size) {
        close(lock->fd);
        return fail("%s is in the way: a file that is not empty, so no lock", lock->path);
    }
    if (fstat(lock->fd, &mine) == 0 && stat(lock->path, &named) == 0 &&
        mine.st_dev == named.st_dev && mine.st_ino == named.st_ino)
        return 0;
    close(lock->fd); // the run that made it has removed it
    return 1;
}
#endif

// Takes the lock of the run that writes the model `out`. 0, or -1 after fail().
static int run_lock_take(RunLock *lock, const char *out) {
    int result = 0;
#ifdef MAMBA_POSIX
    const size_t room = strlen(out) + sizeof ".lock";
    lock->path = malloc(room);
    if (!lock->path) return fail("out of memory: the name of %s", out);
    snprintf(lock->path, room, "%s.lock", out);
    result = 1;
    for (int attempt = 0; attempt < 100 && result == 1; attempt++) result = run_lock_try(lock, out);
    if (result == 1) result = fail("%s: another run is starting with it", out);
    if (result == 0)
        exchange_temporary(NULL, lock->path); // a signal that ends the process removes it
    else {
        free(lock->path);
        lock->path = NULL;
    }
#endif
    (void)out;
    (void)lock;
    return result;
}

// --- what the name holds already

static bool holds_something(const char *path) {
    FILE *f = fopen(path, "rb");
    bool some = f && fgetc(f) != EOF;
    if (f) fclose(f);
    return some;
}

// The value of an option in a run's settings, or NULL.
static const char *setting_of(const TrainRun *run, const char *name) {
    for (size_t i = 0; i < run->settings_bytes; i += strlen(run->settings + i) + 1)
        if (!strcmp(run->settings + i, name)) return run->settings + i + strlen(name) + 1;
    return NULL; // a NUL follows the last one
}

// Why a new run may not take the name of this one, after `step` steps, and what to type. Returns
// -1.
static int explain_run(const TrainRun *run, uint64_t step, const char *out, const char *path) {
    const char *steps = setting_of(run, "--steps"), *schedule = setting_of(run, "--schedule");
    const char *grows = setting_of(run, "--grow-from"), *keep = "another -o keeps it, --force "
                                                                "replaces it";
    const unsigned long long done = step;
    if (!steps || !schedule || strtoull(steps, NULL, 10) > step)
        return fail("%s holds a run of %llu%s%s steps: --resume goes on with it, %s", path, done,
                    steps ? " of " : "", steps ? steps : "", keep);
    if (!strcmp(schedule, "cosine") || (grows && strcmp(grows, "0")))
        return fail("%s holds a finished run of %llu steps: --from %s -o NEW trains its model on, "
                    "%s",
                    path, done, out, keep);
    return fail("%s holds a finished run of %llu steps: --resume --steps MORE makes it longer, %s",
                path, done, keep);
}

// A new run may write `out` and its checkpoint where they are not there yet, or where the run
// starts `from` that model. 0, or -1 after fail().
static int check_new_run(const char *out, const char *checkpoint, const char *from) {
    TrainRun run;
    uint64_t step;
    if (holds_something(checkpoint)) {
        if (mamba_checkpoint_peek(&run, &step, checkpoint))
            return fail("%s is in the way, and is no checkpoint: choose another -o, or --force "
                        "replaces it",
                        checkpoint);
        int result = explain_run(&run, step, out, checkpoint);
        free((char *)(uintptr_t)run.settings);
        return result;
    }
    if ((from && same_file(out, from)) || !holds_something(out)) return 0;
    if (file_holds(out) != A_MODEL)
        return fail("%s exists and is no model: another -o keeps it, --force replaces it", out);
    return fail("%s exists: --from %s -o NEW trains it on, another -o keeps it, --force replaces "
                "it",
                out, out);
}

// --- the log

// The CSV log of a run. When it cannot be written, training goes on and the run fails at its end.
typedef struct {
    const char *path;
    FILE *f;   // NULL: lost
    int error; // errno of what lost it
} TrainLog;

static void log_lost(TrainLog *log, int error) {
    log->error = error ? error : EIO;
    fprintf(stderr, "\nmamba: %s: %s: training goes on without the log\n", log->path,
            strerror(log->error));
}

// After each line: what is not in the file yet would be missing after a kill.
static void log_flush(TrainLog *log) {
    errno = 0;
    if (!log->f || (!fflush(log->f) && !ferror(log->f))) return;
    log_lost(log, errno);
    fclose(log->f);
    log->f = NULL;
}

static void log_close(TrainLog *log) {
    if (log->f && fclose(log->f)) log_lost(log, errno);
    log->f = NULL;
}

// The old log, or NULL if there is none to be read (*failed: after fail()).
static char *read_log(const char *path, bool *failed) {
    size_t bytes;
    *failed = false;
    if (!is_replaceable(path)) return NULL;
    FILE *f = fopen(path, "rb");
    if (!f && errno == ENOENT) return NULL;
    if (!f) fail("%s: %s", path, strerror(errno));
    char *text = f ? read_stream(f, path, &bytes) : NULL;
    *failed = !text;
    return text;
}

// Begins the log, or goes on with the old one after `step`: its later lines go, because the resumed
// run writes them again. The old log is whole until the new one is. 0, or -1 after fail().
static int log_open(TrainLog *log, const char *path, uint64_t step) {
    NewFile w;
    bool failed = false;
    char *old = step ? read_log(path, &failed) : NULL;
    *log = (TrainLog){.path = path};
    if (failed || new_file_open(&w, path, true)) {
        free(old);
        return -1;
    }
    if (!old || !strchr(old, '\n'))
        fprintf(w.f, "step,tokens,seconds,loss,held_out,learning_rate,gradient_norm,"
                     "tokens_per_second\n");
    for (char *line = old; line && *line;) {
        char *end = strchr(line, '\n');
        size_t n = end ? (size_t)(end + 1 - line) : 0; // an unfinished line is dropped
        if (n && (line == old || strtoull(line, NULL, 10) <= step)) fwrite(line, 1, n, w.f);
        line = n ? line + n : NULL;
    }
    free(old);
    if (!w.temporary) {
        log->f = w.f; // a device or a pipe stays open
        log_flush(log);
        return 0;
    }
    if (new_file_commit(&w)) return -1;
    log->f = fopen(path, "ab");
    return log->f ? 0 : fail("cannot write %s: %s", path, strerror(errno));
}
