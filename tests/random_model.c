// random_model.c - writes a model of random weights, for speeds and memory:
//   random_model OUT WIDTH LAYERS VOCABULARY [bf16]      130M: 768 24 50280; 2.8B: 2560 64 50280
#define MAMBA_NO_MAIN
#include "../mamba.c"

int main(int argc, char **argv) {
    if (argc != 5 && (argc != 6 || strcmp(argv[5], "bf16"))) return 2;
    const int D = atoi(argv[2]);
    Config c = {.type = argc == 6 ? BF16 : F32,
                .flags = FLAG_TIED | FLAG_CONV_BIAS,
                .D = D,
                .n_layer = atoi(argv[3]),
                .V = atoi(argv[4]),
                .E = 2 * D,
                .N = 16,
                .K = 4,
                .R = (D + 15) / 16,
                .norm_eps = 1e-5f,
                .bos = -1,
                .pad = -1,
                .eos = {-1, -1, -1, -1}};
    Model *m = mamba_random_model(&c, 1);
    if (!m || mamba_save(m, argv[1])) fprintf(stderr, "%s\n", error_text);
    return *error_text != 0;
}
