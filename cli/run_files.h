// cli/run_files.h - what a training run writes beside its model: the log.
//
// Depends on cli/options.h (read_stream) and files/new_file.h.

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
