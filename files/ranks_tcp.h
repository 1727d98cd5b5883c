// files/ranks_tcp.h: how the processes of files/ranks.h find each other, exchange a few numbers,
// and notice that one of them has ended.
//
// torchrun, mpirun and srun tell a process its rank by variables of the environment. Every rank but
// 0 has two connections to rank 0. On one they exchange numbers when all come to the same point. On
// the other each sends a beat every second, from a thread that does nothing else: the watch. A
// connection that closes, or is silent, is a rank that has ended; rank 0 tells the others which.
// A rank that waits for the others longer than `patience` ends the run too: one of them hangs. Time
// in which rank 0 reads or writes files does not count. The main thread sees all this in
// mamba_ranks_check(); where it is stuck in a library, the watch ends the process.

#ifdef MAMBA_NCCL
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>

enum { RANKS_MOST = 4096, RANK_NAME = 48, RANKS_PATIENCE = 40 }; // the last: seconds
enum { CHANNEL_WORK, CHANNEL_WATCH, CHANNELS };
// What a beat says: it computes; it reads or writes files; it waits for others; it has done its
// work and leaves; it leaves after an error, which it has told; rank `about` has ended, so the run
// has.
enum { BEAT_COMPUTES = 1, BEAT_FILES, BEAT_WAITS, BEAT_DONE, BEAT_FAILED, BEAT_LOST };
enum { ABOUT_NONE = 0xFFFF };

typedef struct { // the first bytes on a connection
    char magic[8];
    uint32_t order, size, rank, channel; // order: 1, so that another byte order shows
    char name[RANK_NAME];                // of the host
} RankHello;
typedef struct {
    uint8_t kind, unused;
    uint16_t about; // a rank
} Beat;

typedef struct Watch {
    pthread_t thread;
    pthread_mutex_t lock;    // of what follows
    bool waiting, files;     // the main thread waits for others; it reads or writes files
    bool stop, failed;       // the watch shall end; the run has ended
    double since, worked;    // when the wait began; when the main thread last stopped waiting
    double longest;          // seconds between two waits
    double patience, filed;  // seconds; when rank 0 was last known to read or write files
    char text[300];          // why the run has ended
    int *link;               // (size) sockets of beats, as Ranks.work; -1: closed in order
    double *heard;           // (size) when
    uint8_t *kind;           // (size) of the last beat
    char (*name)[RANK_NAME]; // (size) of hosts; known to rank 0
} Watch;

static double ranks_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
static void ranks_sleep(double s) {
    struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

static int ranks_fail(Ranks *r, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n =
        r->size > 1 ? snprintf(r->text, sizeof r->text, "rank %d of %d: ", r->rank, r->size) : 0;
    vsnprintf(r->text + n, sizeof r->text - (size_t)n, format, args);
    va_end(args);
    return fail("%s", r->text);
}

// --- the environment

// *x: the number in a variable, -1 where it is not set. 0, or -1 after fail().
static int ranks_number(const char *name, int *x) {
    const char *text = name ? getenv(name) : NULL;
    char *end;
    *x = -1;
    if (!text || !*text) return 0;
    long n = strtol(text, &end, 10);
    if (*end || n < 0 || n > 65535) return fail("%s='%.40s' is not a number of ranks", name, text);
    *x = (int)n;
    return 0;
}

// The first name of a list of hosts as Slurm writes it: "node[07-12,3],b" is node07.
static void ranks_first_host(char *to, size_t room, const char *list) {
    size_t n = 0;
    bool inside = false;
    for (; *list && n + 1 < room; list++) {
        if (*list == '[') inside = true;
        else if (*list == ',' || *list == ']' || (inside && *list == '-')) break;
        else to[n++] = *list;
    }
    to[n] = 0;
}

// Fills in r from what has started this process. by stays NULL where nothing has. 0, or -1 after
// fail().
static int ranks_environment(Ranks *r) {
    // Inside a job of Slurm mpirun's and mpiexec's variables count; srun may set PMI_RANK, but not
    // MPI_LOCALRANKID. A batch script, which is no rank, has SLURM_PROCID, but no
    // SLURM_STEP_NUM_TASKS.
    static const struct {
        const char *by, *rank, *size, *local, *local_size;
    } launcher[] = {
        {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
        {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
         "OMPI_COMM_WORLD_LOCAL_SIZE"},
        {"mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
        {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", NULL},
    };
    int on_host = -1, nodes, port, job, i = 0;
    *r = (Ranks){.size = 1, .local = -1, .err = STDERR_FILENO};
    for (; i < 4; i++)
        if (getenv(launcher[i].rank) && getenv(launcher[i].size) &&
            (i != 2 || getenv(launcher[i].local) || !getenv(launcher[3].size)))
            break;
    if (i == 4) return 0;
    if (ranks_number(launcher[i].rank, &r->rank) || ranks_number(launcher[i].size, &r->size) ||
        ranks_number(launcher[i].local, &r->local) ||
        ranks_number(launcher[i].local_size, &on_host) ||
        ranks_number("SLURM_STEP_NUM_NODES", &nodes) || ranks_number("MASTER_PORT", &port))
        return -1;
    if (r->size < 1 || r->size > RANKS_MOST || r->rank < 0 || r->rank >= r->size)
        return fail("%s=%s is not a rank of %s=%s, which may be 1 to %d", launcher[i].rank,
                    getenv(launcher[i].rank), launcher[i].size, getenv(launcher[i].size),
                    RANKS_MOST);
    r->by = launcher[i].by;
    if (i == 3 && nodes == 1) on_host = r->size;
    // torchrun listens on MASTER_PORT itself. Jobs of Slurm that share a host differ in their
    // number.
    if (port > 0 && getenv("TORCHELASTIC_RUN_ID")) port += port < 65535 ? 1 : -1;
    const char *id = getenv("SLURM_JOB_ID"), *hosts = getenv("SLURM_STEP_NODELIST");
    job = id ? (int)(strtoul(id, NULL, 10) % 10000) : 0;
    if (port <= 0) port = i == 3 ? 20000 + job : 29517;
    snprintf(r->port, sizeof r->port, "%d", port);
    if (!hosts) hosts = getenv("SLURM_NODELIST");
    if (!hosts) hosts = getenv("SLURM_LAUNCH_NODE_IPADDR");
    const char *host = getenv("MASTER_ADDR");
    if (on_host == r->size) strcpy(r->host, "127.0.0.1");
    else if (host && *host) snprintf(r->host, sizeof r->host, "%s", host);
    else if (i == 3 && hosts) ranks_first_host(r->host, sizeof r->host, hosts);
    if (r->size > 1 && !r->host[0])
        return ranks_fail(r, "%s does not say where rank 0 runs: set MASTER_ADDR to its host%s",
                          r->by, i == 1 ? " (mpirun -x MASTER_ADDR=host)" : "");
    return 0;
}

// --- connections

static bool ranks_send(int to, const void *data, size_t n) {
    return send(to, data, n, MSG_NOSIGNAL) == (ssize_t)n; // few bytes
}

static void ranks_prepare_socket(int s, int seconds) {
    const int yes = 1;
    const struct timeval limit = {seconds, 0}; // of a connect too
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    fcntl(s, F_SETFD, FD_CLOEXEC);
}

static RankHello ranks_hello(const Ranks *r, int channel) {
    RankHello h = {"mamba.r1", 1, (uint32_t)r->size, (uint32_t)r->rank, (uint32_t)channel, ""};
    gethostname(h.name, RANK_NAME - 1);
    return h;
}

// A socket that asks a port of this host where nobody listens may get itself.
static bool ranks_is_itself(int s) {
    struct sockaddr_storage own = {0}, other = {0};
    socklen_t n = sizeof own, m = sizeof other;
    errno = ECONNREFUSED;
    return !getsockname(s, (struct sockaddr *)&own, &n) &&
           !getpeername(s, (struct sockaddr *)&other, &m) && n == m && !memcmp(&own, &other, n);
}

// A socket that is connected to rank 0, or listens as rank 0; -1 with errno set, or, where the host
// has no address, after fail().
static int ranks_socket(Ranks *r, bool listens) {
    const bool here = !strcmp(r->host, "127.0.0.1") || !strcmp(r->host, "localhost");
    struct addrinfo hints = {.ai_family = listens && !here ? AF_INET6 : AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = listens ? AI_PASSIVE : 0},
                    *all = NULL;
    const int yes = 1, no = 0;
    int s = -1, why = getaddrinfo(listens && !here ? NULL : r->host, r->port, &hints, &all);
    if (why && listens) { // a machine without IPv6
        hints.ai_family = AF_INET;
        why = getaddrinfo(here ? r->host : NULL, r->port, &hints, &all);
    }
    if (why) {
        ranks_fail(r, "MASTER_ADDR %s: %s", r->host, gai_strerror(why));
        errno = 0;
        return -1;
    }
    for (struct addrinfo *a = all; a && s < 0; a = a->ai_next) {
        s = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (s < 0) continue;
        ranks_prepare_socket(s, 3);
        if (listens) setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (a->ai_family == AF_INET6) setsockopt(s, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
        if (listens ? bind(s, a->ai_addr, a->ai_addrlen) || listen(s, 512)
                    : connect(s, a->ai_addr, a->ai_addrlen) || ranks_is_itself(s)) {
            why = errno;
            close(s);
            errno = why;
            s = -1;
        }
    }
    freeaddrinfo(all);
    return s;
}

// Rank 0 takes the connections of all others. 0, or -1 after fail(), which names who did not come.
static int ranks_accept(Ranks *r, double deadline) {
    Watch *w = r->watch;
    int missing = CHANNELS * (r->size - 1), door = ranks_socket(r, true);
    if (door < 0)
        return errno ? ranks_fail(r, "cannot listen on port %s: %s; MASTER_PORT chooses another",
                                  r->port, strerror(errno))
                     : -1;
    while (missing && ranks_now() < deadline) {
        struct pollfd p = {door, POLLIN, 0};
        RankHello h;
        int s = poll(&p, 1, 200) > 0 ? accept(door, NULL, NULL) : -1;
        if (s < 0) continue;
        ranks_prepare_socket(s, 3);
        bool good = recv(s, &h, sizeof h, MSG_WAITALL) == (ssize_t)sizeof h;
        const RankHello want = ranks_hello(r, 0);
        good = good && !memcmp(h.magic, want.magic, sizeof h.magic) && h.order == 1 &&
               h.size == want.size && h.rank > 0 && h.rank < h.size && h.channel < CHANNELS;
        int *place = !good ? NULL : (h.channel == CHANNEL_WORK ? r->work : w->link) + h.rank;
        if (place && *place < 0) {
            *place = s;
            missing--;
            memcpy(w->name[h.rank], h.name, RANK_NAME - 1);
        } else close(s); // a stranger, or a second process of this rank
    }
    close(door);
    if (!missing) return 0;
    char who[120] = "";
    for (int i = 1; i < r->size && strlen(who) < sizeof who - 12; i++)
        if (r->work[i] < 0 || w->link[i] < 0)
            snprintf(who + strlen(who), sizeof who - strlen(who), " %d", i);
    return ranks_fail(r, "these ranks did not come to port %s of this host: %s", r->port, who + 1);
}

static int ranks_connect(Ranks *r, double deadline) {
    int *const place[CHANNELS] = {&r->work[0], &r->watch->link[0]};
    for (int channel = 0; channel < CHANNELS;) {
        const RankHello h = ranks_hello(r, channel);
        int s = ranks_socket(r, false);
        if (s >= 0 && ranks_send(s, &h, sizeof h)) {
            *place[channel++] = s;
            continue;
        }
        if (s < 0 && errno == 0 && ranks_now() > deadline - 30) return -1; // no such host
        if (s >= 0) close(s);
        if (ranks_now() > deadline)
            return ranks_fail(r, "rank 0 does not answer at %s, port %s", r->host, r->port);
        ranks_sleep(0.2);
    }
    return 0;
}

// --- the watch

// Ends the run, with the reason: the first one is kept. lock is held.
static void watch_fail(Ranks *r, int about, const char *format, ...) {
    Watch *w = r->watch;
    va_list args;
    if (w->failed) return;
    va_start(args, format);
    vsnprintf(w->text, sizeof w->text, format, args);
    va_end(args);
    w->failed = true;
    const Beat beat = {BEAT_LOST, 0, (uint16_t)about};
    for (int i = 1; i < r->size && r->rank == 0; i++)
        if (w->link[i] >= 0) send(w->link[i], &beat, sizeof beat, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void watch_hear(Ranks *r, int from, double now) {
    Watch *w = r->watch;
    const char *name = w->name[from];
    Beat beat = {0, 0, 0};
    if (recv(w->link[from], &beat, sizeof beat, MSG_WAITALL) != (ssize_t)sizeof beat) {
        close(w->link[from]);
        w->link[from] = -1;
        watch_fail(r, from, "rank %d%s%s has ended: its connection closed", from,
                   *name ? " on " : "", name);
        return;
    }
    w->heard[from] = now;
    w->kind[from] = beat.kind;
    if (beat.kind == BEAT_FILES && from == 0) w->filed = now;
    if (beat.kind == BEAT_FAILED)
        watch_fail(r, from, "rank %d%s%s has failed; its own line says why", from,
                   *name ? " on " : "", name);
    if (beat.kind == BEAT_LOST && beat.about == ABOUT_NONE)
        watch_fail(r, ABOUT_NONE, "rank 0 has given up: the ranks wait for each other in vain");
    else if (beat.kind == BEAT_LOST)
        watch_fail(r, 0, "rank %d has ended or hangs, says rank 0", beat.about);
    if (beat.kind != BEAT_DONE) return;
    close(w->link[from]);
    w->link[from] = -1;
}

// This rank has waited for so many seconds: a rank that still computes is the one that hangs.
static void watch_late(Ranks *r, double limit) {
    const Watch *w = r->watch;
    int who = ABOUT_NONE;
    for (int i = 0; i < r->size; i++)
        if (w->link[i] >= 0 && w->kind[i] != BEAT_WAITS) who = i;
    if (who == ABOUT_NONE)
        watch_fail(r, who, "all ranks have waited for each other for %.0f s", limit);
    else
        watch_fail(r, who, "rank %d%s%s hangs: the others have waited for %.0f s", who,
                   *w->name[who] ? " on " : "", w->name[who], limit);
}

// A beat to each, what has come from each, and what all that means. The time to sleep is poll's.
static void watch_round(Ranks *r, struct pollfd *p, double *sent) {
    Watch *w = r->watch;
    const int links = r->rank == 0 ? r->size : 1;
    for (int i = 0; i < links; i++) p[i] = (struct pollfd){w->link[i], POLLIN, 0};
    poll(p, (nfds_t)links, 250);
    const double now = ranks_now();
    pthread_mutex_lock(&w->lock);
    if (r->rank == 0 && w->files) w->filed = now;
    if (now - *sent >= w->patience / 40) {
        const Beat beat = {w->files ? BEAT_FILES : w->waiting ? BEAT_WAITS : BEAT_COMPUTES, 0, 0};
        *sent = now;
        for (int i = 0; i < links; i++)
            if (w->link[i] >= 0) send(w->link[i], &beat, sizeof beat, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    for (int i = 0; i < links && !w->failed; i++) {
        if (w->link[i] < 0) continue;
        if (p[i].revents) watch_hear(r, i, now);
        else if (now - w->heard[i] > w->patience / 2)
            watch_fail(r, i, "rank %d%s%s has been silent for %.0f s", i, *w->name[i] ? " on " : "",
                       w->name[i], now - w->heard[i]);
    }
    // Rank 0 knows who computes: it speaks first.
    const double limit = w->patience * (r->rank ? 1.25 : 1) + 2 * w->longest;
    if (w->waiting && now - fmax(w->since, w->filed) > limit) watch_late(r, limit);
    pthread_mutex_unlock(&w->lock);
}

static void *watch_run(void *ranks) {
    Ranks *r = (Ranks *)ranks;
    Watch *w = r->watch;
    struct pollfd p[RANKS_MOST];
    double sent = 0, failed = 0;
    for (bool stop = false; !stop;) {
        watch_round(r, p, &sent);
        pthread_mutex_lock(&w->lock);
        stop = w->stop;
        if (w->failed && !failed) failed = ranks_now();
        const double grace = w->patience * (w->files ? 0.8 : 0.2);
        if (failed && !stop && ranks_now() - failed > grace) { // the main thread is stuck
            char line[400];
            int n = snprintf(line, sizeof line, "mamba: rank %d of %d: %s\n", r->rank, r->size,
                             w->text);
            if (r->last) r->last();
            if (write(r->err, line, (size_t)n) < 0) _exit(2);
            _exit(1);
        }
        pthread_mutex_unlock(&w->lock);
        if (failed) ranks_sleep(0.05); // closed connections make poll return at once
    }
    return NULL;
}

// --- what the main thread calls

// Whether the run still goes: 0, or -1 after fail(), which says which rank has ended.
int mamba_ranks_check(Ranks *r) {
    Watch *w = r->watch;
    if (!w) return 0;
    pthread_mutex_lock(&w->lock);
    const bool failed = w->failed;
    pthread_mutex_unlock(&w->lock);
    return failed ? ranks_fail(r, "%s", w->text) : 0; // the text does not change again
}

// From here on this rank waits for others, or no longer does.
void mamba_ranks_waiting(Ranks *r, bool waiting) {
    Watch *w = r->watch;
    if (!w) return;
    const double now = ranks_now();
    pthread_mutex_lock(&w->lock);
    if (waiting && !w->waiting) {
        if (w->worked && !w->files) w->longest = fmax(w->longest, now - w->worked);
        w->since = now;
    }
    if (!waiting) w->worked = now;
    w->waiting = waiting;
    pthread_mutex_unlock(&w->lock);
}

// This rank begins to read or write files, or is done: for rank 0 the others wait as long as that
// takes. A run begins so.
void mamba_ranks_files(Ranks *r, bool files) {
    Watch *w = r->watch;
    if (!w) return;
    pthread_mutex_lock(&w->lock);
    w->files = files;
    w->worked = 0; // files are no part of the time that a step takes
    pthread_mutex_unlock(&w->lock);
}

// n bytes to or from another rank. A closed connection is left to the watch, which knows more. 0,
// or -1 after fail().
static int ranks_move(Ranks *r, int with, void *data, size_t n, bool sends) {
    unsigned char *at = (unsigned char *)data;
    while (n) {
        struct pollfd p = {r->work[with], sends ? POLLOUT : POLLIN, 0};
        if (mamba_ranks_check(r)) return -1;
        if (poll(&p, 1, 100) <= 0) continue;
        ssize_t moved = sends ? send(p.fd, at, n, MSG_NOSIGNAL) : recv(p.fd, at, n, 0);
        if (moved > 0) {
            at += moved;
            n -= (size_t)moved;
        } else if (moved == 0 || (errno != EAGAIN && errno != EINTR)) {
            for (int i = 0; i < 40 && !mamba_ranks_check(r); i++) ranks_sleep(0.05);
            return mamba_ranks_check(r)
                       ? -1
                       : ranks_fail(r, "the connection to rank %d has closed", with);
        }
    }
    return 0;
}

// Every rank gets the sums over all ranks of its n numbers, added in the order of ranks: the same
// bits everywhere, and in every run. 0, or -1 after fail().
int mamba_ranks_sum(Ranks *r, double *x, int n) {
    double other[8];
    const size_t bytes = (size_t)n * sizeof *x;
    int bad = 0;
    assert(n <= 8);
    mamba_ranks_waiting(r, true);
    for (int i = 1; i < r->size && r->rank == 0 && !bad; i++) {
        bad = ranks_move(r, i, other, bytes, false);
        for (int k = 0; k < n && !bad; k++) x[k] += other[k];
    }
    for (int i = 1; i < r->size && r->rank == 0 && !bad; i++)
        bad = ranks_move(r, i, x, bytes, true);
    if (r->rank) bad = ranks_move(r, 0, x, bytes, true) || ranks_move(r, 0, x, bytes, false);
    mamba_ranks_waiting(r, false);
    return bad ? -1 : 0;
}

// Every rank gets rank 0's bytes. 0, or -1 after fail().
int mamba_ranks_share(Ranks *r, void *data, size_t bytes) {
    int bad = 0;
    mamba_ranks_waiting(r, true);
    for (int i = 1; i < r->size && r->rank == 0 && !bad; i++)
        bad = ranks_move(r, i, data, bytes, true);
    if (r->rank) bad = ranks_move(r, 0, data, bytes, false);
    mamba_ranks_waiting(r, false);
    return bad ? -1 : 0;
}

// This rank has failed. The others hear of it at once; what it still does here may take long, but
// not for ever.
void mamba_ranks_give_up(Ranks *r) {
    Watch *w = r->watch;
    if (!w) return;
    const Beat beat = {BEAT_FAILED, 0, 0};
    char own[40];
    const int n = snprintf(own, sizeof own, "rank %d of %d: ", r->rank, r->size);
    pthread_mutex_lock(&w->lock);
    for (int i = 0; i < r->size; i++)
        if (w->link[i] >= 0) send(w->link[i], &beat, sizeof beat, MSG_NOSIGNAL | MSG_DONTWAIT);
    watch_fail(r, r->rank, "%s", error_text + (strncmp(error_text, own, (size_t)n) ? 0 : n));
    pthread_mutex_unlock(&w->lock);
}

// Leaves the run; well: with its work done, else after an error that this process tells.
void mamba_ranks_close(Ranks *r, bool well) {
    Watch *w = r->watch;
    if (!w) return;
    const Beat beat = {well ? BEAT_DONE : BEAT_FAILED, 0, 0};
    pthread_mutex_lock(&w->lock);
    for (int i = 0; i < r->size; i++)
        if (w->link[i] >= 0) send(w->link[i], &beat, sizeof beat, MSG_NOSIGNAL | MSG_DONTWAIT);
    w->stop = true;
    pthread_mutex_unlock(&w->lock);
    if (w->thread) pthread_join(w->thread, NULL);
    for (int i = 0; i < r->size; i++) {
        if (w->link[i] >= 0) close(w->link[i]);
        if (r->work[i] >= 0) close(r->work[i]);
    }
    pthread_mutex_destroy(&w->lock);
    free(w->link);
    free(w->heard);
    free(w->kind);
    free(w->name);
    free(w);
    free(r->work);
    r->watch = NULL;
    r->work = NULL;
}

// Finds out whether torchrun, mpirun or srun has started this process, and meets the other ranks.
// 0, or -1 after fail(). MAMBA_PATIENCE: seconds that ranks wait for each other; three times as
// long at the start.
int mamba_ranks_open(Ranks *r) {
    const char *seconds = getenv("MAMBA_PATIENCE");
    const double patience = seconds && atof(seconds) > 0 ? atof(seconds) : RANKS_PATIENCE;
    if (ranks_environment(r)) return -1;
    if (r->size == 1) return 0;
    const size_t n = (size_t)r->size;
    Watch *w = r->watch = (Watch *)calloc(1, sizeof *w);
    if (!w) return ranks_fail(r, "out of memory");
    pthread_mutex_init(&w->lock, NULL);
    w->patience = patience;
    w->link = (int *)malloc(n * sizeof *w->link);
    r->work = (int *)malloc(n * sizeof *r->work);
    w->heard = (double *)calloc(n, sizeof *w->heard);
    w->kind = (uint8_t *)calloc(n, sizeof *w->kind);
    w->name = (char(*)[RANK_NAME])calloc(n, RANK_NAME);
    int bad = !w->link || !r->work || !w->heard || !w->kind || !w->name;
    if (bad) r->size = 0; // close() has no sockets to look at
    for (int i = 0; i < r->size; i++) w->link[i] = r->work[i] = -1;
    const double deadline = ranks_now() + 3 * patience;
    if (bad) ranks_fail(r, "out of memory");
    else bad = r->rank ? ranks_connect(r, deadline) : ranks_accept(r, deadline);
    // Rank 0 may still wait for others.
    for (int i = 0; i < r->size; i++) w->heard[i] = r->rank ? deadline : ranks_now();
    w->filed = deadline;
    w->files = true;
    if (!bad && pthread_create(&w->thread, NULL, watch_run, r))
        bad = ranks_fail(r, "no thread for the watch");
    char go = 1;
    if (!bad) bad = mamba_ranks_share(r, &go, 1);
    pthread_mutex_lock(&w->lock);
    w->filed = ranks_now();
    pthread_mutex_unlock(&w->lock);
    if (bad) mamba_ranks_close(r, false);
    return bad ? -1 : 0;
}

#else // without NCCL a process trains alone
int mamba_ranks_open(Ranks *r) {
    *r = (Ranks){.size = 1, .local = -1};
    return 0;
}
void mamba_ranks_files(Ranks *r, bool files) { (void)r, (void)files; }
void mamba_ranks_give_up(Ranks *r) { (void)r; }
void mamba_ranks_close(Ranks *r, bool well) { (void)r, (void)well; }
int mamba_ranks_check(Ranks *r) { return (void)r, 0; }
int mamba_ranks_sum(Ranks *r, double *x, int n) { return (void)r, (void)x, (void)n, 0; }
int mamba_ranks_share(Ranks *r, void *data, size_t n) { return (void)r, (void)data, (void)n, 0; }
#endif
