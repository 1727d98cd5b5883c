// cpu/levels.h: several sets of instructions in one program (make dist).
//
// The Makefile compiles mamba.c once as the program, with -DMAMBA_LEVELS and instructions that
// every processor has, and once for each further set with -DMAMBA_LEVEL=NAME. Such a level is cpu/
// alone: it ends after this file and exports one table of its operations. At its start the program
// chooses the best table that the processor can run. From here on `matmul(...)` in mamba.c calls
// through that table. The lines that run are the same as in any build; the compiler made several
// copies of them.
//
// Reading and writing text at a level has the bits of a build for it alone: `--cpu-level avx2`
// gives those of `make ARCH="-mavx2 -mfma"` (tests/test_dist.sh). In training, what mamba.c does
// itself, such as AdamW, is compiled for every processor, and its last bits are those of cpu-level
// base.

#include "ceilings.h"

// clang-format off
#define LEVEL_OPERATIONS(X) \
    X(tensor_widen) X(norm_rows) X(norm_rows_backward) X(add_rows) X(sum_rows) X(sum_squares) \
    X(matmul_floats) X(matmul) X(matmul_backward) X(log_sum_exp) X(cross_entropy) X(conv1d_silu) \
    X(conv1d_silu_backward) X(softplus_bias) X(softplus_backward) X(gate) X(gate_backward) \
    X(recurrence) X(recurrence_again) X(recurrence_backward) X(read_floats) X(multiply_adds)
// clang-format on

#define LEVEL_FIELD(name) __typeof__(name) *name;
#define LEVEL_VALUE(name) .name = name,
typedef struct {
    const char *level;
    int scan_width; // SCAN_WIDTH
    LEVEL_OPERATIONS(LEVEL_FIELD)
} CpuLevel;

#define LEVEL_TABLE(name) mamba_cpu_##name
#define LEVEL_TABLE_OF(name) LEVEL_TABLE(name)
#define LEVEL_NAME(name) #name
#define LEVEL_NAME_OF(name) LEVEL_NAME(name)

#ifdef MAMBA_LEVEL
extern const CpuLevel LEVEL_TABLE_OF(MAMBA_LEVEL);
const CpuLevel LEVEL_TABLE_OF(MAMBA_LEVEL) = {LEVEL_NAME_OF(MAMBA_LEVEL), SCAN_WIDTH,
                                              LEVEL_OPERATIONS(LEVEL_VALUE)};
#else

static const CpuLevel cpu_base = {"base", SCAN_WIDTH, LEVEL_OPERATIONS(LEVEL_VALUE)};
static const CpuLevel *cpu_level = &cpu_base;

#if defined(__x86_64__) || defined(__i386__)
extern const CpuLevel mamba_cpu_avx2, mamba_cpu_avx512;
static const CpuLevel *const CPU_LEVELS[] = {&mamba_cpu_avx512, &mamba_cpu_avx2, &cpu_base};
static bool cpu_runs(const CpuLevel *level) {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == &mamba_cpu_avx2) return avx2;
    if (level != &mamba_cpu_avx512) return true;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else // elsewhere base is all there is: NEON on 64-bit Arm
static const CpuLevel *const CPU_LEVELS[] = {&cpu_base};
static bool cpu_runs(const CpuLevel *level) { return level == &cpu_base; }
#endif
enum { N_LEVELS = sizeof CPU_LEVELS / sizeof *CPU_LEVELS };

// The level of this name; NULL: the best that runs. 0, or -1 after fail().
static int cpu_choose_level(const char *name) {
    char known[128] = "";
    for (int i = 0; i < N_LEVELS; i++) {
        const CpuLevel *level = CPU_LEVELS[i];
        size_t n = strlen(known);
        snprintf(known + n, sizeof known - n, "%s%s", n ? ", " : "", level->level);
        if (name ? strcmp(name, level->level) != 0 : !cpu_runs(level)) continue;
        if (!cpu_runs(level)) return fail("--cpu-level %s: this processor cannot run it", name);
        cpu_level = level;
        return 0;
    }
    return fail("--cpu-level '%s': this program has %s", name, known);
}
__attribute__((constructor)) static void cpu_choose_best(void) { cpu_choose_level(NULL); }

#undef SCAN_WIDTH
#define SCAN_WIDTH (cpu_level->scan_width)
#define tensor_widen(...) cpu_level->tensor_widen(__VA_ARGS__)
#define norm_rows(...) cpu_level->norm_rows(__VA_ARGS__)
#define norm_rows_backward(...) cpu_level->norm_rows_backward(__VA_ARGS__)
#define add_rows(...) cpu_level->add_rows(__VA_ARGS__)
#define sum_rows(...) cpu_level->sum_rows(__VA_ARGS__)
#define sum_squares(...) cpu_level->sum_squares(__VA_ARGS__)
#define matmul_floats(...) cpu_level->matmul_floats(__VA_ARGS__)
#define matmul(...) cpu_level->matmul(__VA_ARGS__)
#define matmul_backward(...) cpu_level->matmul_backward(__VA_ARGS__)
#define log_sum_exp(...) cpu_level->log_sum_exp(__VA_ARGS__)
#define cross_entropy(...) cpu_level->cross_entropy(__VA_ARGS__)
#define conv1d_silu(...) cpu_level->conv1d_silu(__VA_ARGS__)
#define conv1d_silu_backward(...) cpu_level->conv1d_silu_backward(__VA_ARGS__)
#define softplus_bias(...) cpu_level->softplus_bias(__VA_ARGS__)
#define softplus_backward(...) cpu_level->softplus_backward(__VA_ARGS__)
#define gate(...) cpu_level->gate(__VA_ARGS__)
#define gate_backward(...) cpu_level->gate_backward(__VA_ARGS__)
#define recurrence(...) cpu_level->recurrence(__VA_ARGS__)
#define recurrence_again(...) cpu_level->recurrence_again(__VA_ARGS__)
#define recurrence_backward(...) cpu_level->recurrence_backward(__VA_ARGS__)
#define read_floats(...) cpu_level->read_floats(__VA_ARGS__)
#define multiply_adds(...) cpu_level->multiply_adds(__VA_ARGS__)
#endif
