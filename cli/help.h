// cli/help.h - options: a table describes them. It parses, checks ranges, says what to type instead
// of a mistake, and makes the help, the man page and the completion of bash.
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
        return fail("%s needs %s, not '%s'%s", o->name, whole ? "a whole number" : "a number", text,
                    !whole && *end == ',' ? ": a point stands before decimals" : "");
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
    const bool number = !text[strspn(text, "0123456789.,eE+-")]; // maybe a wrong one, such as 0,9
    if (o->kind == OPT_REAL && !strcmp(o->name, "-p") && !number)
        return fail(
            "-p is top-p, a number: the prompt '%s' goes without an option, after the model", text);
    if (o->kind == OPT_LIST) return parse_list_item(o, text);
    if (o->kind != OPT_TEXT) return parse_number(o, text);
    *(const char **)o->value = text;
    return 0;
}

static const Option *find_option(const char *name, const Option *options, int n_options) {
    if (!strcmp(name, "-q")) name = "--quiet"; // as other programs have it
    for (int i = 0; i < n_options; i++)
        if (!strcmp(name, options[i].name)) return &options[i];
    return NULL;
}

// --- mistakes: the answer says what to type

enum { WORD_MAX = 32 }; // longer words are not compared

static int smallest(int a, int b, int c) {
    int ab = a < b ? a : b;
    return ab < c ? ab : c;
}

// How many letters must be put in, left out, changed, or exchanged with the next to make b of a.
static int edits(const char *a, const char *b) {
    int row[3][WORD_MAX + 1];
    const int n = (int)strlen(a), m = (int)strlen(b);
    if (n > WORD_MAX || m > WORD_MAX) return WORD_MAX;
    for (int j = 0; j <= m; j++) row[0][j] = j;
    for (int i = 1; i <= n; i++) {
        int *now = row[i % 3], *above = row[(i + 2) % 3], *two_above = row[(i + 1) % 3];
        now[0] = i;
        for (int j = 1; j <= m; j++) {
            int change = above[j - 1] + (a[i - 1] != b[j - 1]);
            now[j] = smallest(above[j] + 1, now[j - 1] + 1, change);
            bool crossed = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (crossed && two_above[j - 2] + 1 < now[j]) now[j] = two_above[j - 2] + 1;
        }
    }
    return row[n % 3][m];
}

// Whether word is name with a slip of the finger or two.
static bool is_near(const char *word, const char *name) {
    size_t n = strlen(name);
    return n > 2 && strlen(word) > 1 && edits(word, name) <= (n > 4 ? 2 : 1);
}

// What other programs call an option, and what it is called here.
static const struct {
    const char *theirs, *ours;
} OTHER_NAMES[] = {
    {"temp", "-t"},
    {"temperature", "-t"},
    {"top-k", "-k"},
    {"top-p", "-p"},
    {"seed", "-s"},
    {"random-seed", "-s"},
    {"threads", "-T"},
    {"jobs", "-T"},
    {"j", "-T"},
    {"n-predict", "-n"},
    {"max-tokens", "-n"},
    {"max-new-tokens", "-n"},
    {"tokens", "-n"},
    {"steps", "-n"},
    {"length", "-n"},
    {"num-samples", "--samples"},
    {"repetition-penalty", "--repeat-penalty"},
    {"reverse-prompt", "--stop"},
    {"r", "--stop"},
    {"file", "-f"},
    {"output", "-o"},
    {"out", "-o"},
    {"text", "--data"},
    {"dataset", "--data"},
    {"train-data", "--data"},
    {"input", "--data"},
    {"i", "--data"},
    {"epochs", "--steps"},
    {"iters", "--steps"},
    {"max-iters", "--steps"},
    {"n", "--steps"},
    {"learning-rate", "--lr"},
    {"batch-size", "--batch"},
    {"b", "--batch"},
    {"block-size", "--length"},
    {"seq-len", "--length"},
    {"ctx-size", "--length"},
    {"c", "--length"},
    {"n-layer", "--layers"},
    {"n-layers", "--layers"},
    {"dim", "--d-model"},
    {"weight-decay", "--decay"},
    {"grad-clip", "--clip"},
    {"model", "--from"},
    {"m", "--from"},
    {"check", "--verify"},
    {"type", "--dtype"},
    {"no-gpu", "--cpu"},
};

// Options of other programs that have none here.
static const struct {
    const char *theirs, *answer;
} NOT_OPTIONS[] = {
    {"m", "the model is the first argument: mamba model.bin \"prompt\""},
    {"model", "the model is the first argument: mamba model.bin \"prompt\""},
    {"prompt", "the prompt goes without an option, after the model: mamba model.bin \"prompt\""},
    {"i", "without a prompt it is a session: mamba model.bin"},
    {"interactive", "without a prompt it is a session: mamba model.bin"},
    {"cnv", "without a prompt it is a session: mamba model.bin"},
    {"chat", "without a prompt it is a session: mamba model.bin"},
    {"ngl", "a build with a GPU backend (make cuda) uses the GPU"},
    {"gpu", "a build with a GPU backend (make cuda) uses the GPU"},
    {"device", "a build with a GPU backend (make cuda) uses the GPU"},
    {"c", "there is no context size: the state does not grow with the text"},
    {"ctx-size", "there is no context size: the state does not grow with the text"},
    {"v", "mamba --version"},
    {"version", "mamba --version"},
};

// The option that word names in another way, or NULL. word: an argument without dashes, in lower
// case, with - for _.
static const Option *renamed_option(const char *word, const Option *options, int n_options) {
    for (int i = 0; i < n_options; i++)
        if (!strcmp(word, options[i].name + strspn(options[i].name, "-"))) return &options[i];
    for (int i = 0; i < COUNT(OTHER_NAMES); i++) {
        const Option *o = find_option(OTHER_NAMES[i].ours, options, n_options);
        if (o && !strcmp(word, OTHER_NAMES[i].theirs)) return o;
    }
    return NULL;
}

// Says what was meant by arg, which is no option. Returns -1.
static int unknown_option(const char *arg, const Option *options, int n_options) {
    char word[WORD_MAX + 2];
    const char *letters = arg + strspn(arg, "-");
    size_t n = 0;
    for (; letters[n] && letters[n] != '=' && n < sizeof word - 1; n++) {
        char c = letters[n];
        word[n] = c == '_' ? '-' : c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
    }
    word[n] = 0;
    const Option *o = renamed_option(word, options, n_options);
    for (int i = 0; i < COUNT(NOT_OPTIONS) && !o; i++)
        if (!strcmp(word, NOT_OPTIONS[i].theirs))
            return fail("unknown option '%s': %s", arg, NOT_OPTIONS[i].answer);
    for (int i = 0; i < n_options && !o; i++)
        if (is_near(word, options[i].name + strspn(options[i].name, "-"))) o = &options[i];
    for (int i = 0; i < COUNT(OTHER_NAMES) && !o && n > 4; i++)
        if (is_near(word, OTHER_NAMES[i].theirs))
            o = find_option(OTHER_NAMES[i].ours, options, n_options);
    for (int i = 0; i < COUNT(NOT_OPTIONS) && !o; i++)
        if (n > 4 && is_near(word, NOT_OPTIONS[i].theirs))
            return fail("unknown option '%s': %s", arg, NOT_OPTIONS[i].answer);
    if (o)
        return fail("unknown option '%s': did you mean %s%s%s?", arg, o->name,
                    *o->argument ? " " : "", o->argument);
    return fail("unknown option '%s' (--help lists all; put -- before a prompt that starts with a "
                "dash)",
                arg);
}

// --- parsing

// Whether an argument is text: it has no dash in front, or is - alone, -5 or "- a list". No option
// looks like these.
static bool is_text(const char *arg) {
    return arg[0] != '-' || !arg[1] || (arg[1] >= '0' && arg[1] <= '9') || strchr(arg, ' ') ||
           strchr(arg, '\n');
}

// The option that arg names, or NULL. *value: what stands after = in "--name=value", the number of
// "-n5", or NULL.
static const Option *option_of(const char *arg, const char **value, const Option *options,
                               int n_options) {
    const Option *o = find_option(arg, options, n_options);
    *value = NULL;
    for (int i = 0; i < n_options && !o; i++) {
        const OptionKind kind = options[i].kind;
        size_t n = strlen(options[i].name);
        bool joined = n == 2 && (kind == OPT_INT || kind == OPT_REAL) && arg[1] && arg[2] &&
                      !arg[2 + strspn(arg + 2, "0123456789.,-")];
        if (strncmp(arg, options[i].name, n) || (arg[n] != '=' && !joined)) continue;
        if (kind == OPT_SWITCH) break;
        o = &options[i];
        *value = arg + n + !joined;
    }
    return o;
}

// Parses the options in argv[1..argc). The other arguments go, in order, into rest (room for max).
// Returns how many those are, or -1 after fail(). After `--` nothing is an option.
static int parse_options(int argc, char **argv, const Option *options, int n_options,
                         const char **rest, int max) {
    int n_rest = 0;
    bool only_rest = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *value;
        const Option *o = only_rest ? NULL : option_of(arg, &value, options, n_options);
        if (!only_rest && !strcmp(arg, "--")) {
            only_rest = true;
        } else if (!o && !only_rest && !is_text(arg)) {
            return unknown_option(arg, options, n_options);
        } else if (!o && n_rest == max) {
            FILE *f = fopen(arg, "rb"); // then its spaces are not the matter
            const char *hint = find_option("--data", options, n_options)
                                   ? " (a text to learn needs --data before it)"
                               : f ? ""
                                   : " (what has spaces needs quotes)";
            if (f) fclose(f);
            return fail("one argument too many: '%s'%s", arg, hint);
        } else if (!o) {
            rest[n_rest++] = arg;
        } else if (o->kind == OPT_SWITCH) {
            *(bool *)o->value = true;
        } else {
            if (!value && i + 1 == argc) return fail("%s needs a value: %s", o->name, o->argument);
            if (!value) value = argv[++i];
            if (parse_value(o, value)) return -1;
        }
    }
    return n_rest;
}

// Whether the help is asked for. The value of an option asks for nothing: --stop -h.
static bool wants_help(int argc, char **argv, const Option *options, int n_options) {
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++) {
        const char *value;
        const Option *o = option_of(argv[i], &value, options, n_options);
        if (!o && (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))) return true;
        if (o && o->kind != OPT_SWITCH && !value) i++;
    }
    return false;
}

// --- help

// What print_help() makes of a command's usage and options.
static enum { AS_TEXT, AS_MAN_PAGE, AS_COMPLETION, AS_VALUES } help_form;

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

static void print_text_help(const char *usage, const Option *options, int n_options) {
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
}

// Text for man: a - is a minus as it is typed, a \ is written \e, and no line begins with . or '.
static void print_roff(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        bool first = i == 0 || text[i - 1] == '\n';
        if (first && (text[i] == '.' || text[i] == '\'')) printf("\\&");
        if (text[i] == '-') printf("\\-");
        else if (text[i] == '\\') printf("\\e");
        else putchar(text[i]);
    }
}

// A usage text has paragraphs between empty lines. Those of forms of the command keep their lines.
static void print_man_help(const char *usage, const Option *options, int n_options) {
    for (const char *text = usage; *text; text += strspn(text, "\n")) {
        const char *empty = strstr(text, "\n\n");
        const size_t n = empty ? (size_t)(empty + 1 - text) : strlen(text);
        const bool forms = !strncmp(text, "mamba ", 6);
        printf(text == usage ? ".nf\n" : forms ? ".PP\n.nf\n" : ".PP\n");
        print_roff(text, n);
        if (forms) printf(".fi\n");
        text += n;
    }
    for (int i = 0; i < n_options; i++) {
        const Option *o = &options[i];
        char value[64];
        default_text(value, o);
        if (!strcmp(o->name, "-T")) value[0] = 0; // it is another on another machine
        printf(".TP\n.B ");
        print_roff(o->name, strlen(o->name));
        if (*o->argument) printf(" \\fI%s\\fR", o->argument);
        printf("\n");
        print_roff(o->help, strlen(o->help));
        printf("%s%s\n", value[0] ? " " : "", value);
    }
}

// Returns 0, the result of a command that shows its help.
static int print_help(const char *usage, const Option *options, int n_options) {
    if (help_form == AS_TEXT) print_text_help(usage, options, n_options);
    if (help_form == AS_MAN_PAGE) print_man_help(usage, options, n_options);
    for (int i = 0; i < n_options; i++) {
        if (help_form == AS_COMPLETION) printf("%s ", options[i].name);
        const char *word = options[i].argument; // "mean|last"
        if (help_form != AS_VALUES || !strchr(word, '|')) continue;
        printf("    %s) values=\"", options[i].name);
        for (; *word; word++) putchar(*word == '|' ? ' ' : *word);
        printf("\" ;;\n");
    }
    return 0;
}
