// files/ranks.h: the processes that train one model together, one a GPU. files/ranks_tcp.h has the
// functions.

typedef struct Ranks {
    int rank, size;      // the number of this process, and of how many; alone: 0 and 1
    int local;           // its number on its host; -1: unknown
    const char *by;      // what started it: torchrun, mpirun, mpiexec, srun; NULL: it is alone
    char host[256];      // where rank 0 listens
    char port[8];        // the same
    int *work;           // (size) sockets of exchanges: rank 0 has one to each; the others have [0]
    struct Watch *watch; // knows which ranks are alive
    void (*last)(void);  // before this process ends without its main thread; or NULL
    int err;             // where sentences go
    char text[400];      // why the last call failed
} Ranks;

#ifdef __cplusplus
extern "C" {
#endif
int mamba_ranks_sum(Ranks *r, double *x, int n);
int mamba_ranks_share(Ranks *r, void *data, size_t bytes);
void mamba_ranks_waiting(Ranks *r, bool waiting);
int mamba_ranks_check(Ranks *r);
#ifdef __cplusplus
}
#endif
