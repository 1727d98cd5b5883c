// cli/help.h - options: a table describes them. It parses, checks ranges and prints the help.
//
// Depends on files/bytes.h (fail).

// --- options: a table describes them; it parses, checks ranges and prints the help

typedef enum { OPT_SWITCH, OPT_INT, OPT_REAL, OPT_TEXT, OPT_LIST } OptionKind;
enum { LIST_MAX = 16 };
typedef struct {
    int n;
    const char *item[LIST_MAX];
} TextList;

typedef struct {
    const char *name, *argument, *help;
    OptionKind kind;
    void *value; // bool, long, double, const char * or TextList; holds the default
    double lowest, highest;
} Option;

// Rows of an option table. The value comes first, the help last.
#define OPTION_SWITCH(name, value, help) {name, "", help, OPT_SWITCH, value, 0, 0}
#define OPTION_INT(name, argument, value, lowest, highest, help) \
    {name, argument, help, OPT_INT, value, lowest, highest}
#define OPTION_REAL(name, argument, value, lowest, highest, help) \
    {name, argument, help, OPT_REAL, value, lowest, highest}
#define OPTION_TEXT(name, argument, value, help) {name, argument, help, OPT_TEXT, value, 0, 0}
#define OPTION_LIST(name, argument, value, help) {name, argument, help, OPT_LIST, value, 0, 0}

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static int parse_number(const Option *o, const char *text) {
    const bool whole = o->kind == OPT_INT;
    char *end = NULL;
    errno = 0;
    double x = whole ? (double)strtoll(text, &end, 10) : strtod(text, &end);
    if (end == text || *end || errno == ERANGE || x != x)
        return fail("%s needs %s, not '%s'", o->name, whole ? "a whole number" : "a number", text);
    double highest = whole ? fmin(o->highest, (double)LONG_MAX) : o->highest; // long of 32 bits
    if (!(x >= o->lowest && x <= highest))
        return fail("%s %s is out of range: %.10g to %.10g", o->name, text, o->lowest, highest);
    if (whole) *(long *)o->value = strtol(text, NULL, 10);
    else *(double *)o->value = x;
    return 0;
}

static int parse_list_item(const Option *o, const char *text) {
    TextList *list = o->value;
    if (list->n == LIST_MAX) return fail("%s was given more than %d times", o->name, LIST_MAX);
    if (!*text) return fail("%s needs a text that is not empty", o->name);
    list->item[list->n++] = text;
    return 0;
}

static int parse_value(const Option *o, const char *text) {
    if (o->kind == OPT_LIST) return parse_list_item(o, text);
    if (o->kind != OPT_TEXT) return parse_number(o, text);
    *(const char **)o->value = text;
    return 0;
}

static const Option *find_option(const char *name, const Option *options, int n_options) {
    for (int i = 0; i < n_options; i++)
        if (!strcmp(name, options[i].name)) return &options[i];
    return NULL;
}

// Parses the options in argv[1..argc). The other arguments go, in order, into rest (room for max).
// Returns how many those are, or -1 after fail(). After `--` nothing is an option. `-` alone is
// never an option, nor is a number such as -1 that follows an option.
static int parse_options(int argc, char **argv, const Option *options, int n_options,
                         const char **rest, int max) {
    int n_rest = 0;
    bool only_rest = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (!only_rest && !strcmp(arg, "--")) {
            only_rest = true;
            continue;
        }
        if (only_rest || arg[0] != '-' || !arg[1]) {
            if (n_rest == max)
                return fail("one argument too many: '%s' (a prompt with spaces needs quotes)", arg);
            rest[n_rest++] = arg;
            continue;
        }
        const Option *o = find_option(arg, options, n_options);
        if (!o)
            return fail("unknown option '%s' (put -- before a prompt that starts with a dash)",
                        arg);
        if (o->kind == OPT_SWITCH) {
            *(bool *)o->value = true;
            continue;
        }
        i++;
        if (i == argc) return fail("%s needs a value: %s", o->name, o->argument);
        if (parse_value(o, argv[i])) return -1;
    }
    return n_rest;
}

static bool wants_help(int argc, char **argv) {
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return true;
    return false;
}

enum { HELP_COLUMN = 22, HELP_WIDTH = 100 };

// Prints a word of a help text after a space, or on a new line where it does not fit. Returns the
// column after it.
static int print_word(const char *word, int length, int column) {
    if (column + 1 + length > HELP_WIDTH) {
        printf("\n%*s", HELP_COLUMN - 1, "");
        column = HELP_COLUMN - 1;
    }
    printf(" %.*s", length, word);
    return column + 1 + length;
}

static void default_text(char text[64], const Option *o) {
    text[0] = 0;
    if (o->kind == OPT_INT && *(long *)o->value != LONG_MIN)
        snprintf(text, 64, "(default %ld)", *(long *)o->value);
    if (o->kind == OPT_REAL) snprintf(text, 64, "(default %g)", *(double *)o->value);
    if (o->kind == OPT_TEXT && *(const char **)o->value)
        snprintf(text, 64, "(default %s)", *(const char **)o->value);
}

// Returns 0, the result of a command that shows its help.
static int print_help(const char *usage, const Option *options, int n_options) {
    printf("%s", usage);
    if (n_options) printf("\nOptions:\n");
    for (int i = 0; i < n_options; i++) {
        const Option *o = &options[i];
        char value[64];
        int column = printf("  %s %s", o->name, o->argument);
        if (column < HELP_COLUMN - 1) column += printf("%*s", HELP_COLUMN - 1 - column, "");
        for (const char *word = o->help; *word;) {
            size_t length = strcspn(word, " ");
            column = print_word(word, (int)length, column);
            word += length;
            word += strspn(word, " ");
        }
        default_text(value, o);
        if (value[0]) print_word(value, (int)strlen(value), column);
        printf("\n");
    }
    return 0;
}
