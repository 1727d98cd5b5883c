// A command line: arguments with zero bytes between them. The first byte chooses a command, whose
// options are parsed; nothing runs.

#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool quiet;
    if (!quiet) quiet = freopen("/dev/null", "w", stdout) != NULL;
    if (size < 2 || size > 4096) return 0;
    enum { MOST = 64 };
    char *argv[MOST + 2], *copy = malloc(size + 1);
    int argc = 1;
    memcpy(copy, data, size);
    copy[size] = 0;
    argv[0] = "mamba";
    for (size_t i = 1; i < size && argc < MOST; i += strlen(copy + i) + 1) argv[argc++] = copy + i;
    argv[argc] = NULL;
    long whole = 3, any = LONG_MIN;
    double real = 0.5;
    bool yes = false;
    const char *text = NULL, *rest[MOST];
    TextList list = {0};
    const Option options[] = {OPTION_INT("-n", "N", &whole, -1, 1e18, "a number"),
                              OPTION_INT("-T", "N", &any, 1, 1024, "threads"),
                              OPTION_REAL("-p", "P", &real, 0, 1, "top-p"),
                              OPTION_SWITCH("--raw", &yes, "a switch"),
                              OPTION_TEXT("-o", "FILE", &text, "a file"),
                              OPTION_LIST("--stop", "TEXT", &list, "some")};
    int n = parse_options(argc, argv, options, COUNT(options), rest, 2);
    must_say_why(n < 0);
    if (n > 2 || list.n > LIST_MAX || !(real >= 0 && real <= 1)) abort();
    GenerateOptions o = {0};
    n = data[0] & 1 ? generate_options(&o, argc, argv, rest) : 0;
    must_say_why(n == -1);
    if (n > 2) abort();
    if (argc > 1 && data[0] & 2) find_command(argv[1]);
    if (data[0] & 4) must_say_why(take_level(&argc, argv) != 0);
    free(copy);
    return 0;
}
