// cli/commands.h - the list of all commands, `mamba help`, and which command runs.
//
// Depends on every other file in cli/.

typedef struct {
    const char *name, *summary;
    int (*run)(int, char **);
} Command;

static const Command COMMANDS[] = {
    {"generate", "go on with a text, or an interactive session", command_generate},
    {"train", "train or fine-tune a model on text of your own", command_train},
    {"eval", "how well a model predicts a text", command_eval},
    {"info", "what is in a model file; --verify checks every byte", command_info},
    {"quantize", "the same model in 8.5 or 4.5 bits a weight", command_quantize},
    {"tokenize", "text to token ids, and back", command_tokenize},
    {"logits", "the numbers that the model computes", command_logits},
    {"bench", "speed, beside what the machine can do", command_bench},
};

// The command of this name, or NULL.
static const Command *find_command(const char *name) {
    for (int i = 0; i < COUNT(COMMANDS); i++)
        if (!strcmp(name, COMMANDS[i].name)) return &COMMANDS[i];
    return NULL;
}

// clang-format off
static const char SHORT_HELP[] =
    "mamba.c " MAMBA_VERSION ": the Mamba language model in C\n"
    "\n"
    "  mamba models/story.bin \"Once upon a time\"   go on with a text\n"
    "  mamba models/story.bin                      a session: line after line\n"
    "  mamba train -o my.bin --data my.txt         learn from a text of your own\n"
    "\n"
    "`mamba help` lists all commands, `mamba help train` the options of one.\n";
static const char HELP_USAGE[] =
    "mamba help [COMMAND]   this list, or the options of a command\n"
    "mamba help --man       the manual page      mamba help --bash   completion for bash\n";
// clang-format on

static void print_commands(void) {
    printf("%s\nCommands:\n", SHORT_HELP);
    for (int i = 0; i < COUNT(COMMANDS); i++)
        printf("  mamba %-9s %s\n", COMMANDS[i].name, COMMANDS[i].summary);
    printf("The word generate may be left out.\n\n%s", HELP_USAGE);
}

// Runs a command that prints its help in this form.
static int show_help(const Command *command) {
    char name[16], option[] = "--help", *argv[] = {name, option, NULL};
    snprintf(name, sizeof name, "%s", command->name);
    return command->run(2, argv);
}

static int print_man_page(void) {
    help_form = AS_MAN_PAGE;
    printf(".TH MAMBA 1 \"\" \"mamba.c " MAMBA_VERSION "\" \"\"\n.SH NAME\n"
           "mamba \\- the Mamba language model\n.SH SYNOPSIS\n.nf\n"
           "mamba model.bin \"prompt\" [options]\nmamba COMMAND [options]\n.fi\n");
    printf(
        ".SH DESCRIPTION\nText goes to stdout, everything about it to stderr.\nThe exit status is "
        "0, or 1 after an error, which is one sentence on stderr.\nA value follows its option, "
        "as in \\fB\\-n 20\\fR or \\fB\\-\\-length=20\\fR.\nAfter \\fB\\-\\-\\fR nothing is an "
        "option.\n.SH COMMANDS\n");
    for (int i = 0; i < COUNT(COMMANDS); i++) {
        printf(".SS %s: %s\n", COMMANDS[i].name, COMMANDS[i].summary);
        if (show_help(&COMMANDS[i])) return -1;
    }
    return 0;
}

static int print_completion(void) {
    help_form = AS_COMPLETION;
    printf("# Completion for bash, written by `mamba help --bash`.\n_mamba() {\n"
           "    local word=${COMP_WORDS[COMP_CWORD]} options values commands=\"help");
    for (int i = 0; i < COUNT(COMMANDS); i++) printf(" %s", COMMANDS[i].name);
    printf("\"\n    case ${COMP_WORDS[1]} in\n    help) options=\"--man --bash\" ;;\n");
    for (int i = 1; i <= COUNT(COMMANDS); i++) { // generate last: it has no name
        const Command *command = &COMMANDS[i % COUNT(COMMANDS)];
        printf("    %s) options=\"", i < COUNT(COMMANDS) ? command->name : "*");
        if (show_help(command)) return -1;
        printf("--help\" ;;\n");
    }
    printf("    esac\n    case ${COMP_WORDS[COMP_CWORD - 1]} in\n");
    help_form = AS_VALUES;
    for (int i = 0; i < COUNT(COMMANDS); i++)
        if (show_help(&COMMANDS[i])) return -1;
    printf(
        "    esac\n    COMPREPLY=()\n"
        "    [[ ${COMP_WORDS[1]} == quantize && $COMP_CWORD == 4 ]] && values=\"q8 q4\"\n"
        "    if [[ -n $values ]]; then COMPREPLY=($(compgen -W \"$values\" -- \"$word\"))\n"
        "    elif [[ $word == -* ]]; then COMPREPLY=($(compgen -W \"$options\" -- \"$word\"))\n"
        "    elif [[ $COMP_CWORD == 1 || ($COMP_CWORD == 2 && ${COMP_WORDS[1]} == help) ]]; then\n"
        "        COMPREPLY=($(compgen -W \"$commands\" -- \"$word\"))\n"
        "    fi\n}\ncomplete -o bashdefault -o default -F _mamba mamba\n");
    return 0;
}

static int command_help(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : NULL;
    if (argc > 2) return fail("help needs one command, '%s' is one too many", argv[2]);
    if (!name || !strcmp(name, "help") || !strcmp(name, "--help") || !strcmp(name, "-h"))
        return print_commands(), 0;
    if (!strcmp(name, "--man")) return print_man_page();
    if (!strcmp(name, "--bash")) return print_completion();
    const Command *command = find_command(name);
    for (int i = 0; i < COUNT(COMMANDS) && !command; i++)
        if (is_near(name, COMMANDS[i].name))
            return fail("there is no command '%s': did you mean `mamba help %s`?", name,
                        COMMANDS[i].name);
    return command ? show_help(command)
                   : fail("there is no command '%s': `mamba help` lists all", name);
}

// Words that other programs begin with, and what to type here.
static const struct {
    const char *word, *answer;
} FIRST_WORDS[] = {
    {"serve", "there is no server; `mamba model.bin` is a session"},
    {"server", "there is no server; `mamba model.bin` is a session"},
    {"chat", "`mamba model.bin` is a session"},
    {"run", "`mamba model.bin \"prompt\"` goes on with a text"},
    {"finetune", "`mamba train --from model.bin --data FILE -o out.bin`"},
    {"convert", "`python export.py CHECKPOINT model.bin`"},
    {"export", "`python export.py CHECKPOINT model.bin`"},
    {"pull", "`python export.py NAME model.bin` fetches a model"},
    {"download", "`python export.py NAME model.bin` fetches a model"},
    {"version", "`mamba --version`"},
};

// Whether the first argument looks like a command, and is none. 0, or -1 after fail().
static int check_command(const char *first) {
    if (can_read(first)) return 0; // a model of that name
    for (int i = 0; i < COUNT(FIRST_WORDS); i++)
        if (!strcmp(first, FIRST_WORDS[i].word))
            return fail("there is no command '%s': %s", first, FIRST_WORDS[i].answer);
    for (int i = 0; i < COUNT(COMMANDS); i++)
        if (is_near(first, COMMANDS[i].name))
            return fail("there is no command '%s': did you mean `mamba %s`?", first,
                        COMMANDS[i].name);
    return 0;
}

static int run_command(int argc, char **argv) {
    const Command *command = argc > 1 ? find_command(argv[1]) : NULL;
    if (argc < 2) {
        fprintf(stderr, "%s\n", SHORT_HELP);
        return fail("a model.bin is needed");
    }
    if (!strcmp(argv[1], "--version")) return printf("mamba.c %s\n", MAMBA_VERSION), 0;
    if (!strcmp(argv[1], "help")) return command_help(argc - 1, argv + 1);
    if (command) return command->run(argc - 1, argv + 1);
    return check_command(argv[1]) ? -1 : command_generate(argc, argv);
}
