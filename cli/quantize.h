// cli/quantize.h - quantize: a model with its matrices in 8.5 or 4.5 bits a weight.
//
// Depends on cli/options.h and the API.

static const char QUANTIZE_USAGE[] =
    "mamba quantize in.bin out.bin q8|q4\n"
    "\n"
    "Writes a model with its matrices in 8.5 or 4.5 bits a weight (32 weights of a row share a\n"
    "scale); what the recurrence touches stays float32. in.bin holds f32, f16 or bf16 and is not\n"
    "changed.\n";

static int command_quantize(int argc, char **argv) {
    const char *rest[3];
    if (wants_help(argc, argv, NULL, 0)) return print_help(QUANTIZE_USAGE, NULL, 0);
    int n = parse_options(argc, argv, NULL, 0, rest, 3);
    if (n != 3) return n < 0 ? -1 : fail("quantize needs in.bin, out.bin and q8 or q4");
    bool four_bits = !strcmp(rest[2], "q4");
    if (!four_bits && strcmp(rest[2], "q8"))
        return fail("quantize needs q8 or q4 at the end, not '%s'", rest[2]);
    const FileUse use[] = {{INPUT, "the model", rest[0], NULL}, {OUTPUT_MODEL, "", rest[1], NULL}};
    if (check_files(use, COUNT(use))) return -1;
    Model *m = load_model(rest[0]), *quantized = NULL;
    int result = m ? 0 : -1;
    if (result == 0 && (m->config.type == Q8 || m->config.type == Q4))
        result = fail("%s is in %s already: quantize the model that it was made from", rest[0],
                      type_name(m->config.type));
    // A damaged model would become one whose checksums are right.
    if (result == 0 && mamba_verify(m)) result = fail_in(rest[0]);
    if (result == 0) {
        quantized = mamba_quantize(m, four_bits);
        if (!quantized) result = fail_in(rest[0]);
    }
    if (result == 0) result = mamba_save(quantized, rest[1]);
    if (result == 0)
        fprintf(stderr, "wrote %s: %.1f MB of weights in %s, from %.1f in %s\n", rest[1],
                (double)quantized->tensors_bytes / 1e6, rest[2], (double)m->tensors_bytes / 1e6,
                type_name(m->config.type));
    mamba_free(quantized);
    mamba_free(m);
    return result;
}
