// cpu/plain_names.h: a build with cpu/ has both forms of each operation below. From here to
// cpu/fast_names.h the plain forms of mamba.c are compiled under names that end in _plain.
//
// A new fast form adds its name here, in cpu/fast_names.h and in tests/test_plain.h.

#define tensor_widen tensor_widen_plain
#define norm_rows norm_rows_plain
#define norm_rows_backward norm_rows_backward_plain
#define add_rows add_rows_plain
#define sum_rows sum_rows_plain
#define sum_squares sum_squares_plain
#define matmul_floats matmul_floats_plain
#define matmul matmul_plain
#define matmul_backward matmul_backward_plain
#define log_sum_exp log_sum_exp_plain
#define cross_entropy cross_entropy_plain
#define conv1d_silu conv1d_silu_plain
#define conv1d_silu_backward conv1d_silu_backward_plain
#define softplus_bias softplus_bias_plain
#define softplus_backward softplus_backward_plain
#define gate gate_plain
#define gate_backward gate_backward_plain
#define recurrence recurrence_plain
#define recurrence_again recurrence_again_plain
#define recurrence_backward recurrence_backward_plain
