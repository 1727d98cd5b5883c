/* linenoise.h -- guerrilla line editing library against the idea that a
 * line editing lib needs to be 20,000 lines of C code.
 *
 * This is a changed version: README.md beside this file says what was
 * changed. You can find the original source code at:
 *
 *   http://github.com/antirez/linenoise
 *
 * Does a number of crazy assumptions that happen to be true in 99.9999% of
 * the 2010 UNIX computers around.
 *
 * ------------------------------------------------------------------------
 *
 *
 * Copyright (c) 2010-2016, Salvatore Sanfilippo <antirez at gmail dot com>
 * Copyright (c) 2010-2013, Pieter Noordhuis <pcnoordhuis at gmail dot com>
 *
 * All rights reserved.
 *
 * Redistribution and use in source and binary forms, with or without
 * modification, are permitted provided that the following conditions are
 * met:
 *
 *  *  Redistributions of source code must retain the above copyright
 *     notice, this list of conditions and the following disclaimer.
 *
 *  *  Redistributions in binary form must reproduce the above copyright
 *     notice, this list of conditions and the following disclaimer in the
 *     documentation and/or other materials provided with the distribution.
 *
 * THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS
 * "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT
 * LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR
 * A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT
 * HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL,
 * SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT
 * LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE,
 * DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY
 * THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT
 * (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
 */

#include <poll.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <termios.h>

enum { LINENOISE_HISTORY = 200, LINENOISE_TAB = 8 };

typedef enum {
    LINENOISE_LINE,
    LINENOISE_END,       /* of the input, or Ctrl-D in an empty line */
    LINENOISE_INTERRUPT, /* Ctrl-C, or a signal that the program caught */
    LINENOISE_FAILED     /* out of memory, or the terminal cannot be read */
} LinenoiseResult;

/* The state during line editing. */
typedef struct {
    int ifd, ofd;       /* Terminal file descriptors: input and output. */
    char *buf;          /* Edited text, malloc'd. */
    size_t len, room;   /* Its length, and the memory of buf. */
    size_t pos;         /* Current cursor position. */
    const char *prompt; /* Prompt to display: ASCII. */
    int plen;           /* Prompt length. */
    int cols, height;   /* Of the terminal. */
    int top;            /* The first row of the text that is shown. */
    int history_index;  /* The history index we are currently editing. */
    int failed;         /* Out of memory. */
} Linenoise;

static struct {
    struct termios original; /* In order to restore at exit. */
    struct termios between;  /* While no line is edited. */
    int ifd, ofd;            /* The terminal, while it is open. */
    volatile sig_atomic_t open, raw, resized, signalled;
    struct sigaction old_winch, old_term, old_hup, old_quit;
    unsigned char in[4096]; /* What was read and is not used yet. */
    size_t at, n;
    char *history[LINENOISE_HISTORY]; /* The last one is the line being edited. */
    int history_len;
} linenoise_at;

enum {
    CTRL_A = 1,
    CTRL_B = 2,
    CTRL_C = 3,
    CTRL_D = 4,
    CTRL_E = 5,
    CTRL_F = 6,
    CTRL_H = 8,
    CTRL_I = 9,
    CTRL_J = 10,
    CTRL_K = 11,
    CTRL_L = 12,
    ENTER = 13,
    CTRL_N = 14,
    CTRL_P = 16,
    CTRL_T = 20,
    CTRL_U = 21,
    CTRL_W = 23,
    CTRL_Z = 26,
    ESC = 27,
    BACKSPACE = 127
};

/* ======================= Low level terminal handling ====================== */

/* True if a line can be edited: both descriptors are terminals that understand
 * basic escape sequences. */
static bool linenoiseSupported(int ifd, int ofd) {
    static const char *const unsupported[] = {"dumb", "cons25", "emacs"};
    const char *term = getenv("TERM");
    for (int j = 0; term && j < 3; j++)
        if (!strcasecmp(term, unsupported[j])) return false;
    return term && isatty(ifd) && isatty(ofd);
}

static void writeTerminal(const char *text) {
    if (write(linenoise_at.ofd, text, strlen(text)) < 0) {
    } /* Can't recover from write error. */
}

static void disableRawMode(void) {
    if (!linenoise_at.raw) return;
    linenoise_at.raw = 0;
    writeTerminal("\x1b[?2004l"); /* pastes as they are */
    tcsetattr(linenoise_at.ifd, TCSADRAIN, &linenoise_at.between);
}

/* The terminal as it was. Safe in a signal handler. */
static void restoreTerminal(void) {
    if (linenoise_at.raw) writeTerminal("\x1b[?2004l");
    if (linenoise_at.open) tcsetattr(linenoise_at.ifd, TCSADRAIN, &linenoise_at.original);
    linenoise_at.raw = 0;
    linenoise_at.open = 0;
}

static void onResize(int number) {
    (void)number;
    linenoise_at.resized = 1;
}

/* The terminal first, then what the program does about the signal. */
static void onDeadly(int number) {
    int error = errno;
    restoreTerminal();
    linenoise_at.signalled = 1;
    sigaction(number,
              number == SIGTERM   ? &linenoise_at.old_term
              : number == SIGQUIT ? &linenoise_at.old_quit
                                  : &linenoise_at.old_hup,
              NULL);
    raise(number);
    errno = error;
}

/* Raw mode: 1960 magic shit. */
static int enableRawMode(void) {
    struct termios raw = linenoise_at.between; /* modify the original mode */
    /* input modes: no break, no CR to NL, no parity check, no strip char,
     * no start/stop output control. */
    raw.c_iflag &= ~(tcflag_t)(BRKINT | ICRNL | INPCK | ISTRIP | IXON);
    /* output modes - disable post processing */
    raw.c_oflag &= ~(tcflag_t)(OPOST);
    /* control modes - set 8 bit chars */
    raw.c_cflag |= (CS8);
    /* local modes - echoing off, canonical off, no extended functions,
     * no signal chars (^Z,^C) */
    raw.c_lflag &= ~(tcflag_t)(ECHO | ICANON | IEXTEN | ISIG);
    /* control chars - set return condition: min number of bytes and timer. */
    raw.c_cc[VMIN] = 1;
    raw.c_cc[VTIME] = 0;
    /* What was typed before is kept: no flush. */
    if (tcsetattr(linenoise_at.ifd, TCSADRAIN, &raw) < 0) return -1;
    linenoise_at.raw = 1;
    writeTerminal("\x1b[?2004h"); /* pastes in brackets */
    return 0;
}

/* Takes the terminal, until linenoiseClose(). Between the lines, keys are not
 * shown and wait for the next one; Enter stays Enter. Ctrl-C is a signal then,
 * Ctrl-Z is not. */
static int linenoiseOpen(int ifd, int ofd) {
    struct sigaction resize = {.sa_handler = onResize}, deadly = {.sa_handler = onDeadly};
    if (tcgetattr(ifd, &linenoise_at.original) == -1) return -1;
    linenoise_at.between = linenoise_at.original;
    linenoise_at.between.c_iflag &= ~(tcflag_t)ICRNL;
    linenoise_at.between.c_lflag &= ~(tcflag_t)(ECHO | ICANON);
    linenoise_at.between.c_cc[VMIN] = 1;
    linenoise_at.between.c_cc[VTIME] = 0;
    linenoise_at.between.c_cc[VSUSP] = _POSIX_VDISABLE;
    linenoise_at.ifd = ifd;
    linenoise_at.ofd = ofd;
    linenoise_at.signalled = 0;
    if (tcsetattr(ifd, TCSADRAIN, &linenoise_at.between) < 0) return -1;
    linenoise_at.open = 1;
    /* What was typed before: Enter was turned into a newline. */
    int early = 0;
    if (ioctl(ifd, FIONREAD, &early) == 0 && early > 0) {
        ssize_t n = read(ifd, linenoise_at.in, sizeof linenoise_at.in);
        linenoise_at.n = n > 0 ? (size_t)n : 0;
        for (size_t i = 0; i < linenoise_at.n; i++)
            if (linenoise_at.in[i] == '\n') linenoise_at.in[i] = ENTER;
    }
    /* These handlers end a read(); one set by signal() would restart it. */
    sigaction(SIGWINCH, &resize, &linenoise_at.old_winch);
    sigaction(SIGTERM, &deadly, &linenoise_at.old_term);
    sigaction(SIGHUP, &deadly, &linenoise_at.old_hup);
    sigaction(SIGQUIT, &deadly, &linenoise_at.old_quit);
    return 0;
}

static void linenoiseClose(void) {
    if (!linenoise_at.open && !linenoise_at.signalled) return;
    restoreTerminal();
    sigaction(SIGWINCH, &linenoise_at.old_winch, NULL);
    sigaction(SIGTERM, &linenoise_at.old_term, NULL);
    sigaction(SIGHUP, &linenoise_at.old_hup, NULL);
    sigaction(SIGQUIT, &linenoise_at.old_quit, NULL);
    while (linenoise_at.history_len) free(linenoise_at.history[--linenoise_at.history_len]);
}

static void getSize(Linenoise *l) {
    struct winsize ws;
    bool known = ioctl(l->ofd, TIOCGWINSZ, &ws) == 0;
    l->cols = known && ws.ws_col > 3 ? ws.ws_col : 80;
    l->height = known && ws.ws_row > 1 ? ws.ws_row : 24;
}

/* True if a byte can be read within some milliseconds. */
static bool inputWaits(const Linenoise *l, int milliseconds) {
    struct pollfd p = {.fd = l->ifd, .events = POLLIN};
    return linenoise_at.at < linenoise_at.n || poll(&p, 1, milliseconds) > 0;
}

static void refreshLine(Linenoise *l);

/* The next byte; -1 at the end of the input and on errors. */
static int readByte(Linenoise *l) {
    while (linenoise_at.at == linenoise_at.n) {
        ssize_t n = read(l->ifd, linenoise_at.in, sizeof linenoise_at.in);
        if (n < 0 && errno == EINTR && linenoise_at.resized && !linenoise_at.signalled) {
            refreshLine(l);
            continue;
        }
        if (n <= 0) return -1;
        linenoise_at.at = 0;
        linenoise_at.n = (size_t)n;
    }
    return linenoise_at.in[linenoise_at.at++];
}

/* ================================= UTF-8 ================================== */

/* The character at text[i] and its length in bytes; a byte that begins no
 * character stands for itself. */
static uint32_t charAt(const char *text, size_t len, size_t i, size_t *bytes) {
    unsigned char c = (unsigned char)text[i];
    size_t n = c < 0xC2 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 1;
    uint32_t code = n == 1 ? c : c & (0x7Fu >> n);
    for (size_t k = 1; k < n; k++) {
        if (i + k >= len || ((unsigned char)text[i + k] & 0xC0) != 0x80) {
            *bytes = 1;
            return c;
        }
        code = code << 6 | ((unsigned char)text[i + k] & 0x3Fu);
    }
    *bytes = n;
    return code;
}

typedef struct {
    uint32_t first, last;
} CharRange;

static bool inRanges(uint32_t c, const CharRange *range, size_t n) {
    for (size_t i = 0; i < n && c >= range[i].first; i++)
        if (c <= range[i].last) return true;
    return false;
}

/* Columns of a character. Control characters are shown as ^X. */
static int charWidth(uint32_t c) {
    static const CharRange marks[] = {
        {0x0300, 0x036F},   {0x0483, 0x0489}, {0x0591, 0x05BD},   {0x05BF, 0x05BF},
        {0x05C1, 0x05C2},   {0x05C4, 0x05C5}, {0x0610, 0x061A},   {0x064B, 0x065F},
        {0x0670, 0x0670},   {0x06D6, 0x06DC}, {0x06DF, 0x06E4},   {0x06E7, 0x06E8},
        {0x06EA, 0x06ED},   {0x093C, 0x093C}, {0x0941, 0x0948},   {0x094D, 0x094D},
        {0x0E31, 0x0E31},   {0x0E34, 0x0E3A}, {0x0E47, 0x0E4E},   {0x1AB0, 0x1AFF},
        {0x1DC0, 0x1DFF},   {0x200B, 0x200F}, {0x202A, 0x202E},   {0x2060, 0x2064},
        {0x20D0, 0x20F0},   {0x302A, 0x302D}, {0x3099, 0x309A},   {0xFE00, 0xFE0F},
        {0xFE20, 0xFE2F},   {0xFEFF, 0xFEFF}, {0x1F3FB, 0x1F3FF}, {0xE0020, 0xE007F},
        {0xE0100, 0xE01EF},
    };
    static const CharRange wide[] = {
        {0x1100, 0x115F},   {0x231A, 0x231B},   {0x2329, 0x232A},   {0x23E9, 0x23EC},
        {0x23F0, 0x23F0},   {0x23F3, 0x23F3},   {0x25FD, 0x25FE},   {0x2614, 0x2615},
        {0x2648, 0x2653},   {0x267F, 0x267F},   {0x2693, 0x2693},   {0x26A1, 0x26A1},
        {0x26AA, 0x26AB},   {0x26BD, 0x26BE},   {0x26C4, 0x26C5},   {0x26CE, 0x26CE},
        {0x26D4, 0x26D4},   {0x26EA, 0x26EA},   {0x26F2, 0x26F3},   {0x26F5, 0x26F5},
        {0x26FA, 0x26FA},   {0x26FD, 0x26FD},   {0x2705, 0x2705},   {0x270A, 0x270B},
        {0x2728, 0x2728},   {0x274C, 0x274C},   {0x274E, 0x274E},   {0x2753, 0x2755},
        {0x2757, 0x2757},   {0x2795, 0x2797},   {0x27B0, 0x27B0},   {0x27BF, 0x27BF},
        {0x2B1B, 0x2B1C},   {0x2B50, 0x2B50},   {0x2B55, 0x2B55},   {0x2E80, 0x303E},
        {0x3041, 0x33FF},   {0x3400, 0x4DBF},   {0x4E00, 0x9FFF},   {0xA000, 0xA4CF},
        {0xA960, 0xA97F},   {0xAC00, 0xD7A3},   {0xF900, 0xFAFF},   {0xFE10, 0xFE19},
        {0xFE30, 0xFE6F},   {0xFF00, 0xFF60},   {0xFFE0, 0xFFE6},   {0x1F004, 0x1F004},
        {0x1F0CF, 0x1F0CF}, {0x1F18E, 0x1F18E}, {0x1F191, 0x1F19A}, {0x1F200, 0x1F320},
        {0x1F32D, 0x1F335}, {0x1F337, 0x1F37C}, {0x1F37E, 0x1F393}, {0x1F3A0, 0x1F3CA},
        {0x1F3CF, 0x1F3D3}, {0x1F3E0, 0x1F3F0}, {0x1F3F4, 0x1F3F4}, {0x1F3F8, 0x1F43E},
        {0x1F440, 0x1F440}, {0x1F442, 0x1F4FC}, {0x1F4FF, 0x1F53D}, {0x1F54B, 0x1F54E},
        {0x1F550, 0x1F567}, {0x1F57A, 0x1F57A}, {0x1F595, 0x1F596}, {0x1F5A4, 0x1F5A4},
        {0x1F5FB, 0x1F64F}, {0x1F680, 0x1F6C5}, {0x1F6CC, 0x1F6CC}, {0x1F6D0, 0x1F6D2},
        {0x1F6D5, 0x1F6D7}, {0x1F6EB, 0x1F6EC}, {0x1F6F4, 0x1F6FC}, {0x1F7E0, 0x1F7EB},
        {0x1F90C, 0x1F93A}, {0x1F93C, 0x1F945}, {0x1F947, 0x1F9FF}, {0x1FA70, 0x1FAFF},
        {0x20000, 0x3FFFD},
    };
    if (c < ' ' || c == 127) return 2;
    if (c < 0x300) return 1;
    if (inRanges(c, marks, sizeof marks / sizeof *marks)) return 0;
    return inRanges(c, wide, sizeof wide / sizeof *wide) ? 2 : 1;
}

/* Where the character after, or before, position i begins. Marks belong to
 * the character before them. */
static size_t nextChar(const Linenoise *l, size_t i) {
    size_t bytes;
    if (i >= l->len) return l->len;
    charAt(l->buf, l->len, i, &bytes);
    for (i += bytes; i < l->len && charWidth(charAt(l->buf, l->len, i, &bytes)) == 0;) i += bytes;
    return i;
}

static size_t previousChar(const Linenoise *l, size_t i) {
    size_t bytes = 0;
    while (i > 0) {
        size_t from = i;
        i--;
        while (i > 0 && from - i < 4 && ((unsigned char)l->buf[i] & 0xC0) == 0x80) i--;
        uint32_t c = charAt(l->buf, l->len, i, &bytes);
        if (i + bytes != from) i = from - 1; /* stray bytes */
        if (charWidth(c) > 0) return i;
    }
    return 0;
}

/* =========================== Line editing ================================= */

/* We define a very simple "append buffer" structure, that is an heap
 * allocated string where we can append to. This is useful in order to
 * write all the escape sequences in a buffer and flush them to the terminal
 * in a single call, to avoid flickering effects. */
typedef struct {
    char *b;
    size_t len, room;
} AppendBuffer;

static void abAppend(AppendBuffer *ab, const char *s, size_t len) {
    if (ab->len + len > ab->room) {
        size_t room = (ab->len + len) * 2 + 256;
        char *larger = realloc(ab->b, room);
        if (!larger) return;
        ab->b = larger;
        ab->room = room;
    }
    memcpy(ab->b + ab->len, s, len);
    ab->len += len;
}

static void abFlush(AppendBuffer *ab, int fd) {
    for (size_t done = 0; done < ab->len;) {
        ssize_t n = write(fd, ab->b + done, ab->len - done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break; /* Can't recover from write error. */
        done += (size_t)n;
    }
    free(ab->b);
}

typedef struct {
    int row, col;
} Cell;

/* How the character at l->buf[i] is shown: its bytes, its columns, and the
 * cell where it stands, given the cell after the character before it. */
typedef struct {
    char shown[2 * LINENOISE_TAB];
    size_t n, bytes;
    int width;
    bool newline;
} Glyph;

static Glyph glyphAt(const Linenoise *l, size_t i, Cell *at) {
    Glyph g = {.n = 0};
    uint32_t c = charAt(l->buf, l->len, i, &g.bytes);
    g.newline = c == '\n';
    g.width = g.newline ? 0 : c == '\t' ? LINENOISE_TAB - at->col % LINENOISE_TAB : charWidth(c);
    if (c >= 0x80 && g.bytes == 1) g.width = 1;
    if (at->col + g.width > l->cols) {
        at->row++;
        at->col = 0;
    }
    if (g.newline) return g;
    g.n = (size_t)g.width;
    if (c == '\t') memset(g.shown, ' ', g.n);
    else if (c < ' ' || c == 127) {
        g.shown[0] = '^';
        g.shown[1] = (char)(c ^ 64);
    } else if (c >= 0x80 && g.bytes == 1) g.shown[0] = '?';
    else {
        g.n = g.bytes;
        memcpy(g.shown, l->buf + i, g.bytes);
    }
    return g;
}

/* Moves to the cell after a character. A new line begins under the prompt's
 * end. */
static void stepOver(const Linenoise *l, const Glyph *g, Cell *at) {
    at->col += g->width;
    if (!g->newline) return;
    at->row++;
    at->col = l->plen;
}

/* The cells of the cursor and of the end of the text. */
static void layOut(const Linenoise *l, Cell *cursor, Cell *end) {
    Cell at = {0, l->plen};
    for (size_t i = 0; i < l->len;) {
        Glyph g = glyphAt(l, i, &at);
        if (i == l->pos) *cursor = at;
        stepOver(l, &g, &at);
        i += g.bytes;
    }
    if (at.col >= l->cols) at = (Cell){at.row + 1, 0};
    if (l->pos >= l->len) *cursor = at;
    if (cursor->col >= l->cols) cursor->col = l->cols - 1; /* on a line's end */
    *end = at;
}

/* Writes what is visible, from row l->top on. Returns the row where the
 * terminal's cursor is then. */
static int writeText(const Linenoise *l, AppendBuffer *ab) {
    Cell at = {0, l->plen};
    int row = l->top;
    if (l->top == 0) abAppend(ab, l->prompt, (size_t)l->plen);
    for (size_t i = 0; i < l->len;) {
        Glyph g = glyphAt(l, i, &at);
        if (at.row >= l->top + l->height) break;
        if (at.row >= l->top && !g.newline) abAppend(ab, g.shown, g.n);
        if (at.row > row) row = at.row;
        stepOver(l, &g, &at);
        i += g.bytes;
        if (g.newline && at.row > l->top && at.row < l->top + l->height) {
            abAppend(ab, "\r\n", 2);
            row = at.row;
        }
        if (g.newline && at.row >= l->top && at.row < l->top + l->height)
            for (int j = 0; j < l->plen; j++) abAppend(ab, " ", 1);
    }
    /* If we are at the very end of the screen with our text, we need to
     * emit a newline and move the cursor to the first column. */
    if (at.col >= l->cols && at.row >= l->top && at.row + 1 < l->top + l->height) {
        abAppend(ab, "\r\n", 2);
        row = at.row + 1;
    }
    return row;
}

/* Rewrite the currently edited text accordingly to the buffer content,
 * cursor position, and size of the terminal. */
static void refreshLine(Linenoise *l) {
    static int shown_row; /* The cursor's row below the first row that is shown. */
    AppendBuffer ab = {NULL, 0, 0};
    Cell cursor, end;
    char seq[64];
    if (linenoise_at.resized) {
        /* The terminal has wrapped the lines anew: where is the cursor now? */
        linenoise_at.resized = 0;
        getSize(l);
        layOut(l, &cursor, &end);
        shown_row = cursor.row - l->top;
        if (shown_row > l->height - 1) shown_row = l->height - 1;
    }
    if (l->top < 0) { /* The first time: nothing is shown yet. */
        l->top = 0;
        shown_row = 0;
    }
    if (shown_row > 0) abAppend(&ab, seq, (size_t)snprintf(seq, 64, "\x1b[%dA", shown_row));
    abAppend(&ab, "\r\x1b[J", 4);
    layOut(l, &cursor, &end);
    if (end.row < l->height) l->top = 0;
    if (cursor.row < l->top) l->top = cursor.row;
    if (cursor.row >= l->top + l->height) l->top = cursor.row - l->height + 1;
    int row = writeText(l, &ab);
    if (row > cursor.row)
        abAppend(&ab, seq, (size_t)snprintf(seq, 64, "\x1b[%dA", row - cursor.row));
    abAppend(&ab, "\r", 1);
    if (cursor.col) abAppend(&ab, seq, (size_t)snprintf(seq, 64, "\x1b[%dC", cursor.col));
    shown_row = cursor.row - l->top;
    abFlush(&ab, l->ofd);
}

/* Insert bytes at the cursor. */
static void linenoiseEditInsert(Linenoise *l, const char *s, size_t n) {
    if (l->len + n + 1 > l->room) {
        size_t room = (l->len + n + 1) * 2;
        char *larger = realloc(l->buf, room);
        if (!larger) {
            l->failed = 1;
            return;
        }
        l->buf = larger;
        l->room = room;
    }
    memmove(l->buf + l->pos + n, l->buf + l->pos, l->len - l->pos);
    memcpy(l->buf + l->pos, s, n);
    l->pos += n;
    l->len += n;
    l->buf[l->len] = '\0';
}

/* Delete the bytes from `from` to `to`; the cursor is then there. */
static void linenoiseEditCut(Linenoise *l, size_t from, size_t to) {
    memmove(l->buf + from, l->buf + to, l->len - to + 1);
    l->len -= to - from;
    l->pos = from;
}

/* Begin and end of the line that position i is in. */
static size_t lineBegin(const Linenoise *l, size_t i) {
    while (i > 0 && l->buf[i - 1] != '\n') i--;
    return i;
}

static size_t lineEnd(const Linenoise *l, size_t i) {
    while (i < l->len && l->buf[i] != '\n') i++;
    return i;
}

static bool isWordByte(char c) {
    unsigned char u = (unsigned char)c;
    return u >= 0x80 || (u >= '0' && u <= '9') || ((u | 32) >= 'a' && (u | 32) <= 'z');
}

static size_t wordBegin(const Linenoise *l, size_t i) {
    while (i > 0 && !isWordByte(l->buf[i - 1])) i--;
    while (i > 0 && isWordByte(l->buf[i - 1])) i--;
    return i;
}

static size_t wordEnd(const Linenoise *l, size_t i) {
    while (i < l->len && !isWordByte(l->buf[i])) i++;
    while (i < l->len && isWordByte(l->buf[i])) i++;
    return i;
}

/* Delete the previous word, as far as the space before it. */
static void linenoiseEditDeletePrevWord(Linenoise *l) {
    size_t from = l->pos;
    while (from > 0 && (l->buf[from - 1] == ' ' || l->buf[from - 1] == '\n')) from--;
    while (from > 0 && l->buf[from - 1] != ' ' && l->buf[from - 1] != '\n') from--;
    linenoiseEditCut(l, from, l->pos);
}

/* Swap the character at the cursor with the one before it. */
static void linenoiseEditSwap(Linenoise *l) {
    size_t middle = l->pos == l->len ? previousChar(l, l->pos) : l->pos;
    size_t from = previousChar(l, middle), to = nextChar(l, middle);
    if (middle == 0 || middle == to) return;
    char *first = strndup(l->buf + from, middle - from);
    if (!first) return;
    memmove(l->buf + from, l->buf + middle, to - middle);
    memcpy(l->buf + to - (middle - from), first, middle - from);
    free(first);
    l->pos = to;
}

/* The text becomes that of the next (-1) or previous (1) history entry. */
static void linenoiseEditHistory(Linenoise *l, int step) {
    int index = l->history_index + step, last = linenoise_at.history_len - 1;
    if (index < 0 || index > last) return;
    char *now = strdup(l->buf);
    if (!now) return;
    free(linenoise_at.history[last - l->history_index]);
    linenoise_at.history[last - l->history_index] = now;
    l->history_index = index;
    const char *entry = linenoise_at.history[last - index];
    l->pos = l->len = 0;
    linenoiseEditInsert(l, entry, strlen(entry));
}

/* Up (-1) and down (1): within the text, else in the history. */
static void linenoiseEditVertical(Linenoise *l, int step) {
    size_t begin = lineBegin(l, l->pos), end = lineEnd(l, l->pos), to;
    if ((step < 0 && begin == 0) || (step > 0 && end == l->len)) {
        linenoiseEditHistory(l, -step);
        return;
    }
    int column = 0;
    for (size_t i = begin; i < l->pos; i = nextChar(l, i)) column++;
    to = step < 0 ? lineBegin(l, begin - 1) : end + 1;
    for (end = lineEnd(l, to); column > 0 && to < end; column--) to = nextChar(l, to);
    l->pos = to < end ? to : end;
}

/* What the terminal pasted, up to ESC [ 201 ~. Line ends become \n. */
static void readPaste(Linenoise *l) {
    static const char stop[] = "\x1b[201~";
    AppendBuffer text = {NULL, 0, 0};
    const size_t n = sizeof stop - 1;
    char last = 0;
    for (;;) {
        int c = readByte(l);
        if (c < 0) break;
        char byte = (char)(c == '\r' ? '\n' : c);
        if (c && !(c == '\n' && last == '\r')) abAppend(&text, &byte, 1);
        last = (char)c;
        if (text.len >= n && !memcmp(text.b + text.len - n, stop, n)) {
            text.len -= n;
            break;
        }
    }
    if (text.len) linenoiseEditInsert(l, text.b, text.len);
    free(text.b);
}

/* ESC [ numbers letter, after "ESC [". */
static void controlSequence(Linenoise *l) {
    int number[2] = {0, 0}, n = 0, c;
    while ((c = readByte(l)) >= 0 && c < '@') {
        if (c == ';' && n < 1) n++;
        else if (c >= '0' && c <= '9' && number[n] < 1000) number[n] = number[n] * 10 + c - '0';
    }
    bool word = number[1] == 5 || number[1] == 3; /* with Ctrl or Alt */
    if (c == '~' && number[0] == 200) readPaste(l);
    else if (c == '~' && number[0] == 3) linenoiseEditCut(l, l->pos, nextChar(l, l->pos));
    else if (c == 'A') linenoiseEditVertical(l, -1);
    else if (c == 'B') linenoiseEditVertical(l, 1);
    else if (c == 'C') l->pos = word ? wordEnd(l, l->pos) : nextChar(l, l->pos);
    else if (c == 'D') l->pos = word ? wordBegin(l, l->pos) : previousChar(l, l->pos);
    else if (c == 'H' || (c == '~' && (number[0] == 1 || number[0] == 7)))
        l->pos = lineBegin(l, l->pos);
    else if (c == 'F' || (c == '~' && (number[0] == 4 || number[0] == 8)))
        l->pos = lineEnd(l, l->pos);
}

static void escape(Linenoise *l) {
    if (!inputWaits(l, 50)) return; /* the key itself */
    int c = readByte(l);
    if (c == '[') controlSequence(l);
    else if (c == 'O') {
        c = readByte(l);
        if (c == 'H') l->pos = lineBegin(l, l->pos);
        if (c == 'F') l->pos = lineEnd(l, l->pos);
        if (c == 'A' || c == 'B') linenoiseEditVertical(l, c == 'A' ? -1 : 1);
        if (c == 'C') l->pos = nextChar(l, l->pos);
        if (c == 'D') l->pos = previousChar(l, l->pos);
    } else if (c == ENTER || c == CTRL_J) linenoiseEditInsert(l, "\n", 1);
    else if (c == 'b') l->pos = wordBegin(l, l->pos);
    else if (c == 'f') l->pos = wordEnd(l, l->pos);
    else if (c == 'd') linenoiseEditCut(l, l->pos, wordEnd(l, l->pos));
    else if (c == BACKSPACE) linenoiseEditCut(l, wordBegin(l, l->pos), l->pos);
}

static void suspend(Linenoise *l) {
    disableRawMode();
    tcsetattr(l->ifd, TCSADRAIN, &linenoise_at.original);
    raise(SIGTSTP);
    enableRawMode();
    l->top = -1; /* draw below what was written meanwhile */
    getSize(l);
}

/* One key. Returns false when the line is done, and *result. */
static bool editKey(Linenoise *l, LinenoiseResult *result) {
    int c = readByte(l);
    char byte = (char)c;
    if (c < 0) {
        *result = linenoise_at.signalled ? LINENOISE_INTERRUPT : LINENOISE_END;
        return false;
    }
    switch (c) {
    case ENTER:
        *result = LINENOISE_LINE;
        return false;
    case CTRL_C:
        *result = LINENOISE_INTERRUPT;
        return false;
    case CTRL_D: /* remove char at right of cursor, or if the line is empty, act as end-of-file. */
        if (l->len == 0) {
            *result = LINENOISE_END;
            return false;
        }
        linenoiseEditCut(l, l->pos, nextChar(l, l->pos));
        break;
    case BACKSPACE:
    case CTRL_H:
        linenoiseEditCut(l, previousChar(l, l->pos), l->pos);
        break;
    case CTRL_T:
        linenoiseEditSwap(l);
        break;
    case CTRL_B:
        l->pos = previousChar(l, l->pos);
        break;
    case CTRL_F:
        l->pos = nextChar(l, l->pos);
        break;
    case CTRL_P:
        linenoiseEditHistory(l, 1);
        break;
    case CTRL_N:
        linenoiseEditHistory(l, -1);
        break;
    case CTRL_U:
        linenoiseEditCut(l, lineBegin(l, l->pos), l->pos);
        break;
    case CTRL_K:
        linenoiseEditCut(l, l->pos, lineEnd(l, l->pos));
        break;
    case CTRL_A:
        l->pos = lineBegin(l, l->pos);
        break;
    case CTRL_E:
        l->pos = lineEnd(l, l->pos);
        break;
    case CTRL_W:
        linenoiseEditDeletePrevWord(l);
        break;
    case CTRL_Z:
        suspend(l);
        break;
    case CTRL_L:
        if (write(l->ofd, "\x1b[H\x1b[2J", 7) < 0) {
        } /* Can't recover from write error. */
        l->top = -1;
        break;
    case ESC:
        escape(l);
        break;
    case CTRL_I:
    case CTRL_J:
        linenoiseEditInsert(l, &byte, 1);
        break;
    default:
        if (c >= ' ') linenoiseEditInsert(l, &byte, 1);
    }
    return true;
}

/* This is the API call to add a new entry in the linenoise history.
 * It uses a fixed array of char pointers that are shifted (memmoved)
 * when the history max length is reached in order to remove the older
 * entry and make room for the new one, so it is not exactly suitable for huge
 * histories, but will work well for a few hundred of entries. */
static void linenoiseHistoryAdd(const char *line) {
    int n = linenoise_at.history_len;
    /* Don't add duplicated lines. */
    if (n && !strcmp(linenoise_at.history[n - 1], line)) return;
    char *copy = strdup(line);
    if (!copy) return;
    if (n == LINENOISE_HISTORY) {
        free(linenoise_at.history[0]);
        n--;
        memmove(linenoise_at.history, linenoise_at.history + 1, (size_t)n * sizeof copy);
    }
    linenoise_at.history[n] = copy;
    linenoise_at.history_len = n + 1;
}

/* Edits a line on the open terminal. *line is malloc'd, n bytes and a NUL,
 * where the result is LINENOISE_LINE. Else *n is how many keys came before the
 * last one. */
static LinenoiseResult linenoise(const char *prompt, char **line, size_t *n) {
    Linenoise l = {.ifd = linenoise_at.ifd,
                   .ofd = linenoise_at.ofd,
                   .prompt = prompt,
                   .plen = (int)strlen(prompt)};
    LinenoiseResult result = LINENOISE_LINE;
    *line = NULL;
    *n = 0;
    if (!linenoise_at.open) return LINENOISE_INTERRUPT;
    linenoiseEditInsert(&l, "", 0);
    if (l.failed) return LINENOISE_FAILED;
    if (enableRawMode() == -1) {
        free(l.buf);
        return LINENOISE_FAILED;
    }
    getSize(&l);
    /* The latest history entry is always our current buffer, that
     * initially is just an empty string. */
    const int entries = linenoise_at.history_len;
    linenoiseHistoryAdd("");
    l.top = -1;
    refreshLine(&l);
    size_t keys = 0;
    for (; editKey(&l, &result) && !l.failed; keys++)
        if (!inputWaits(&l, 0)) refreshLine(&l);
    l.pos = l.len;
    refreshLine(&l);
    if (linenoise_at.history_len > entries || entries == LINENOISE_HISTORY)
        free(linenoise_at.history[--linenoise_at.history_len]);
    writeTerminal(result == LINENOISE_INTERRUPT ? "^C\r\n" : "\r\n");
    disableRawMode();
    *n = result == LINENOISE_LINE ? l.len : keys;
    if (l.failed) result = LINENOISE_FAILED;
    if (result == LINENOISE_LINE) *line = l.buf;
    else free(l.buf);
    return result;
}
