// clang-format off
/* test_all.c - the tests of mamba.c. It includes mamba.c and so reaches everything.

   ./tests/test_all [all] [NAME]    a fixed sample, or the whole; only the groups whose name contains NAME

   Each check prints its name, the largest error, the tolerance and where; the last line is `N passed, N failed, N
   skipped`, and the exit status is the verdict. References are not mamba.c's own: formulas in double precision written
   here from the paper's equations, and golden files that transformers and tokenizers computed (dev/make_golden.py,
   dev/make_tok_golden.py). An error is relative to the largest magnitude of the reference tensor, since elementwise
   relative errors are meaningless where values cancel.

   CONTENTS  comparator | vectors | kernels | scan | model: golden, splits, threads | gradients | state |
             loader | quantiser | tokenizer | sampler | command line | cuda */
// clang-format on

#define TESTING
#include "mamba.c"
#include "tests/common.h"
#include "tests/test_vectors.h"
#include "tests/test_kernels.h"
#include "tests/test_scan.h"
#include "tests/test_model.h"
#include "tests/test_state.h"
#include "tests/test_loader.h"
#include "tests/test_quantiser.h"
#include "tests/test_gradients.h"
#include "tests/test_tokenizer.h"
#include "tests/test_sampler.h"
#include "tests/test_command_line.h"
#include "tests/test_cuda.h"

int main(int argc, char **argv) {
    const struct {
        const char *name;
        void (*run)(void);
    } group[] = {
        {"vectors", test_vectors},
        {"kernels", test_kernels},
        {"scan", test_scan},
        {"model", test_model},
        {"gradients", test_gradients},
        {"state", test_state},
        {"loader", test_loader},
        {"quantiser", test_quantiser},
        {"tokenizer", test_tokenizer},
        {"sampler", test_sampler},
        {"command line", test_command_line},
#ifdef MAMBA_CUDA
        {"cuda", test_cuda},
#endif
    };
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "all")) test_everything = true;
        else only = argv[i];
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    backend.cpu = true; // the groups other than cuda
    for (int i = 0; i < COUNT(group); i++) {
        if (only && !strstr(group[i].name, only)) continue;
        double start = seconds();
        group[i].run();
        printf("---- %s, %.1f s\n", group[i].name, seconds() - start);
    }
    if (sizeof(size_t) < 8) skip("files over 4 GB", "needs a 64-bit size_t");
    printf("%d passed, %d failed, %d skipped\n", n_passed, n_failed, n_skipped);
    return n_failed || !n_passed;
}
