/* cortex_m.c - mamba.c on a microcontroller without a system, without files and without a heap: a
   Cortex-M7, emulated as QEMU's board mps2-an500. dev/cortex_m.sh builds and runs it.

   The model lies in flash as an array, and is used where it lies. Everything else lies in one array
   of 64 kB. Text goes out by semihosting: a debugger, or QEMU, carries out what a breakpoint asks.
   To use another board: its memory in cortex_m.ld, and put_byte(). */
#define MAMBA_NO_MAIN
#define PER_THREAD // one thread, and no system that could keep its variables
#include "../mamba.c"

extern const unsigned char model_bin[], model_bin_end[]; // cortex_m.sh makes them of a file
extern uint32_t stack_bottom[], stack_top[];             // these and the rest by cortex_m.ld
extern uint32_t data_in_flash[], data_start[], data_end[], bss_start[], bss_end[];

enum { MEMORY = 64 * 1024, STACK_PAINT = 0x5ac3u };
static unsigned char memory[MEMORY];

// --- semihosting

enum { SYS_WRITEC = 3, SYS_EXIT_EXTENDED = 0x20, STOPPED = 0x20026 };

static int host(int operation, const void *argument) {
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void put_byte(char c) { host(SYS_WRITEC, &c); }

static void put(const char *text) {
    while (*text) put_byte(*text++);
}

static void put_number(const char *name, long value) {
    char line[64];
    snprintf(line, sizeof line, "%s %ld\n", name, value);
    put(line);
}

static _Noreturn void leave(int status) {
    const uint32_t block[2] = {STOPPED, (uint32_t)status};
    host(SYS_EXIT_EXTENDED, block);
    for (;;) {
    }
}

// newlib's malloc would ask for memory here. Nothing of this program may.
void *_sbrk(ptrdiff_t bytes);
void *_sbrk(ptrdiff_t bytes) {
    (void)bytes;
    put("malloc was called\n");
    leave(2);
}

// --- the program

static bool emit(void *context, int32_t id, const unsigned char *text, size_t n) {
    (void)context;
    (void)id;
    for (size_t i = 0; i < n; i++) put_byte((char)text[i]);
    return false;
}

// Writes the text, then what it took: bytes of the arena, of the stack, and some of the logits.
// Not inlined: reset() must not touch the floating-point unit before it is on.
static __attribute__((noinline)) int run(void) {
    const char *prompt = PROMPT;
    int32_t *ids = NULL;
    size_t n = 0, peak = 0;
    mamba_arena(memory, sizeof memory);
    Model *m = mamba_load_memory(model_bin, (size_t)(model_bin_end - model_bin));
    Acts *a = m ? mamba_acts_pieces(m, 1, 1) : NULL;
    State *s = a ? mamba_state_new(m) : NULL;
    Writing w = {.sampling = {.temperature = 0, .top_p = 1, .repeat_penalty = 1},
                 .most = TOKENS,
                 .emit = emit};
    int bad = !s || mamba_encode(m, prompt, strlen(prompt), &ids, &n) ||
              mamba_prefill(m, a, s, ids, n, NULL, NULL) || mamba_generate(m, a, s, &w) < 0;
    mamba_release(ids);
    put("\n");
    if (bad) put(mamba_error());
    mamba_arena_used(&peak);
    put_number("arena", (long)peak);
    for (int v = 0; !bad && v < m->config.V; v++)
        put_number("logit", (long)lrintf(s->logits[v] * 1e6f));
    mamba_state_free(s);
    mamba_acts_free(a);
    mamba_free(m);
    put_number("left", (long)mamba_arena_used(NULL));
    return bad;
}

void reset(void);
void reset(void) {
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; // CPACR: the floating-point unit is on
    __asm__ volatile("dsb\nisb");
    for (uint32_t *from = data_in_flash, *to = data_start; to < data_end;) *to++ = *from++;
    for (uint32_t *to = bss_start; to < bss_end;) *to++ = 0;
    uint32_t *paint = stack_bottom, *now = __builtin_frame_address(0);
    while (paint < now - 64) *paint++ = STACK_PAINT;
    int bad = run();
    for (paint = stack_bottom; *paint == STACK_PAINT;) paint++;
    put_number("stack", (long)((char *)stack_top - (char *)paint));
    leave(bad ? 1 : 0);
}

static void fault(void) {
    put("a fault of the processor\n");
    leave(3);
}

// The processor starts with the stack and the first function of this table.
__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    stack_top,           (const void *)reset, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault, (const void *)fault};
