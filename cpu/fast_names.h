// cpu/fast_names.h: the end of what cpu/plain_names.h begins. From here on the names mean the fast
// forms, which the rest of cpu/ defines.

#undef tensor_widen
#undef norm_rows
#undef norm_rows_backward
#undef add_rows
#undef sum_rows
#undef sum_squares
#undef matmul_floats
#undef matmul
#undef matmul_backward
#undef log_sum_exp
#undef cross_entropy
#undef conv1d_silu
#undef conv1d_silu_backward
#undef softplus_bias
#undef softplus_backward
#undef gate
#undef gate_backward
#undef recurrence
#undef recurrence_again
#undef recurrence_backward
