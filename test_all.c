/* test_all.c - the tests of mamba.c. It includes mamba.c and so reaches everything in it.

   ./tests/test_all [all] [NAME]
       a fixed sample of the tests, or all of them; with NAME only the groups whose name contains it

   The tests of a group are in tests/test_GROUP.h. Each check prints its name, the largest error,
   the tolerance and the place. The last line is `N passed, N failed, N skipped`. The exit status is
   0 if no check failed.

   No reference comes from mamba.c itself. References are formulas in double precision, written here
   from the paper's equations, and golden files, which transformers and tokenizers computed
   (dev/make_golden.py, dev/make_train_golden.py, dev/make_tok_golden.py). An error is relative to
   the largest magnitude in the reference tensor: where values cancel, the relative error of one
   element means nothing. */

#define TESTING
#include "mamba.c"
#include "tests/common.h"
#include "tests/golden.h"
#include "tests/test_vectors.h"
#include "tests/test_kernels.h"
#include "tests/test_scan.h"
#include "tests/test_plain.h"
#include "tests/test_model.h"
#include "tests/test_gradients.h"
#include "tests/test_state.h"
#include "tests/test_loader.h"
#include "tests/test_memory.h"
#include "tests/test_quantiser.h"
#include "tests/test_tokenizer.h"
#include "tests/test_sampler.h"
#include "tests/test_command_line.h"
#ifdef MAMBA_CUDA
#include "tests/test_cuda.h"
#include "tests/test_cuda_texts.h"
#include "tests/test_cuda_chunks.h"
#include "tests/test_cuda_eval.h"
#endif

int main(int argc, char **argv) {
    const struct {
        const char *name;
        void (*run)(void);
    } group[] = {
        {"vectors", test_vectors},
        {"kernels", test_kernels},
        {"scan", test_scan},
        {"plain", test_plain},
        {"model", test_model},
        {"gradients", test_gradients},
        {"state", test_state},
        {"loader", test_loader},
        {"memory", test_memory},
        {"quantiser", test_quantiser},
        {"tokenizer", test_tokenizer},
        {"sampler", test_sampler},
        {"command line", test_command_line},
#ifdef MAMBA_CUDA
        {"cuda", test_cuda},
        {"cuda chunks", test_cuda_chunks},
        {"cuda texts", test_cuda_texts},
        {"cuda eval", test_cuda_eval},
        {"cuda f16", test_cuda_f16},
        {"cuda packed", test_cuda_packed},
        {"cuda packed one", test_cuda_packed_one},
        {"cuda turns", test_cuda_turns},
        {"cuda faults", test_cuda_faults},
        {"cuda small cards", test_cuda_small_cards},
#endif
    };
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "all")) test_everything = true;
        else only = argv[i];
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    backend.cpu = true; // only the cuda group uses the GPU
    for (int i = 0; i < COUNT(group); i++) {
        if (only && !strstr(group[i].name, only)) continue;
        double start = seconds();
        test_random = TEST_SEED;
        group[i].run();
        printf("---- %s, %.1f s\n", group[i].name, seconds() - start);
    }
    if (sizeof(size_t) < 8) skip("files over 4 GB", "needs a 64-bit size_t");
    printf("%d passed, %d failed, %d skipped\n", n_passed, n_failed, n_skipped);
    return n_failed || !n_passed;
}
