// files/text.h: characters, as tokenizer.c needs them: UTF-8 read and written, the classes of
// Unicode (letter, digit, white space ...), and the two normalizers, NFC and the spaces of
// SentencePiece.
//
// Included by tokenizer.c, which defines Tokenizer (the tables) and Encoder (memory) before it.
//
// Contents: 1. UTF-8  2. Unicode tables  3. NFC, spaces

// -------------------------------------------------------------------------------------------------
// 1. UTF-8. Text is checked once, strictly: no surrogates, no overlong forms, nothing above
// U+10FFFF. After this check, decoding needs no check of lengths.

// Returns the length of the sequence that starts with this byte, or 0 if none does. low, high: the
// range of its second byte.
static int utf8_start(unsigned char first, unsigned char *low, unsigned char *high) {
    *low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    *high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    return first < 0x80   ? 1
           : first < 0xC2 ? 0
           : first < 0xE0 ? 2
           : first < 0xF0 ? 3
           : first < 0xF5 ? 4
                          : 0;
}

// Returns the offset of the first sequence that is not UTF-8, or n if there is none.
static size_t utf8_check(const unsigned char *s, size_t n) {
    size_t i = 0;
    while (i < n) {
        if (s[i] < 0x80) {
            i++;
            continue;
        }
        unsigned char low, high;
        size_t length = (size_t)utf8_start(s[i], &low, &high);
        if (length == 0 || n - i < length || s[i + 1] < low || s[i + 1] > high) return i;
        for (size_t k = 2; k < length; k++)
            if ((s[i + k] & 0xC0) != 0x80) return i;
        i += length;
    }
    return n;
}

// Decodes one character of checked text and advances *at.
static inline uint32_t utf8_next(const unsigned char **at) {
    const unsigned char *p = *at;
    uint32_t c = p[0];
    if (c < 0x80) {
        *at = p + 1;
        return c;
    }
    if (c < 0xE0) {
        *at = p + 2;
        return (c & 0x1F) << 6 | (p[1] & 0x3Fu);
    }
    if (c < 0xF0) {
        *at = p + 3;
        return (c & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    }
    *at = p + 4;
    return (c & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
}

// The start of the character before p.
static const unsigned char *utf8_back(const unsigned char *p) {
    do p--;
    while ((*p & 0xC0) == 0x80);
    return p;
}

// Encodes c in 1 to 4 bytes; returns how many.
static size_t utf8_write(uint32_t c, unsigned char *out) {
    if (c < 0x80) {
        out[0] = (unsigned char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (unsigned char)(0xC0 | c >> 6);
        out[1] = (unsigned char)(0x80 | (c & 0x3F));
        return 2;
    }
    size_t n = 0;
    if (c < 0x10000) out[n++] = (unsigned char)(0xE0 | c >> 12);
    else {
        out[n++] = (unsigned char)(0xF0 | c >> 18);
        out[n++] = (unsigned char)(0x80 | (c >> 12 & 0x3F));
    }
    out[n++] = (unsigned char)(0x80 | (c >> 6 & 0x3F));
    out[n++] = (unsigned char)(0x80 | (c & 0x3F));
    return n;
}

// The byte that c stands for in the byte alphabet, or -1. Printable Latin-1 characters stand for
// themselves; U+0100 to U+0143 stand for the other 68 bytes.
static int alphabet_byte(uint32_t c) {
    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255)) return (int)c;
    if (c < 256 || c > 323) return -1;
    return c < 289 ? (int)c - 256 : c < 323 ? (int)c - 289 + 127 : 173;
}

// -------------------------------------------------------------------------------------------------
// 2. Unicode tables. Whether a character is a letter depends on the version of Unicode. The tables
// in files/unicode.h were read from the library itself. Opening a tokenizer expands them, in 0.3
// ms, to one byte of class bits for each code point.

enum { LETTER = 1, NUMBER = 2, SPACE = 4, IN_WORD = 8, PUNCT = 16, NFC_UNSAFE = 32 };

#include "unicode.h"

// One character is six bits: 0-9 A-Z a-z + -. A table is in pieces, with NULs between them.
static uint32_t table_digit(const char **text) {
    while (!**text) ++*text;
    char c = *(*text)++;
    return (uint32_t)(c == '+'   ? 62
                      : c == '-' ? 63
                      : c <= '9' ? c - '0'
                      : c <= 'Z' ? c - 'A' + 10
                                 : c - 'a' + 36);
}

// Five bits a character, the lowest first. Bit 32: another character follows.
static uint32_t table_number(const char **text) {
    uint32_t n = 0, digit;
    int shift = 0;
    do {
        digit = table_digit(text);
        n |= (digit & 31) << shift;
        shift += 5;
    } while (digit & 32);
    return n;
}

// A signed difference from the value before: 2n for n, 2n - 1 for -n.
static uint32_t table_step(const char **text, uint32_t from) {
    uint32_t n = table_number(text);
    return n & 1 ? from - (n + 1) / 2 : from + n / 2;
}

static int compare_pairs(const void *x, const void *y) {
    uint64_t a = ((const UnicodePair *)x)->ab, b = ((const UnicodePair *)y)->ab;
    return a < b ? -1 : a > b;
}

// Pages whose code points all have the same class share one copy: 1.1 million code points take 90
// kB.
static bool open_classes(Tokenizer *t) {
    uint16_t uniform[64] = {0}; // 1 + the page that holds only this class
    size_t n_pages = 0, capacity = 0;
    const char *text = (const char *)unicode_classes;
    uint32_t left = 0, value = 0;
    for (uint32_t p = 0; p < 0x1100; p++) {
        if (n_pages == capacity) {
            capacity += 128;
            unsigned char *grown = memory_grow(t->classes, capacity * 256);
            if (grown == NULL) return false;
            t->classes = grown;
        }
        unsigned char *page = t->classes + n_pages * 256;
        bool same = left >= 256;
        for (uint32_t i = 0, n; i < 256; i += n, left -= n) {
            if (left == 0) {
                left = table_number(&text);
                value = table_digit(&text);
                same = i == 0 && left >= 256;
            }
            n = left < 256 - i ? left : 256 - i;
            memset(page + i, (int)value, n);
        }
        if (same && uniform[value]) {
            t->page[p] = (uint16_t)(uniform[value] - 1);
            continue;
        }
        if (same) uniform[value] = (uint16_t)(n_pages + 1);
        t->page[p] = (uint16_t)n_pages++;
    }
    return true;
}

static bool open_normalizer(Tokenizer *t) {
    t->order = memory_get(N_ORDERS * sizeof *t->order);
    t->part = memory_get(N_PARTS * sizeof *t->part);
    t->compose = memory_get(N_PAIRS * sizeof *t->compose);
    if (!t->order || !t->part || !t->compose) return false;
    uint32_t c = 0, a = 0, b = 0;
    const char *text = (const char *)unicode_orders;
    for (; t->n_order < N_ORDERS; t->n_order++) {
        UnicodeOrder *o = &t->order[t->n_order];
        o->first = c + table_number(&text);
        o->end = c = o->first + table_number(&text);
        o->order = table_digit(&text);
    }
    c = 0;
    text = (const char *)unicode_parts;
    for (; t->n_part < N_PARTS; t->n_part++) {
        uint32_t step = table_number(&text), kind = step & 3;
        c += step >> 2;
        a = table_step(&text, a);
        if (kind) b = table_step(&text, b);
        t->part[t->n_part] = (UnicodePart){c, a, kind ? b : 0};
        if (kind == 1) t->compose[t->n_compose++] = (UnicodePair){(uint64_t)a << 32 | b, c};
    }
    qsort(t->compose, t->n_compose, sizeof *t->compose, compare_pairs);
    return true;
}

static inline unsigned class_of(const Tokenizer *t, uint32_t c) {
    return t->classes[t->page[c >> 8] * 256u + (c & 255)];
}

static inline unsigned next_class(const Tokenizer *t, const unsigned char **at) {
    if (**at < 0x80) return t->classes[*(*at)++]; // ASCII is in page 0, stored first
    return class_of(t, utf8_next(at));
}

// -------------------------------------------------------------------------------------------------
// 3. NFC, spaces. A character is safe if NFC does not change it and it does not combine with what
// stands before it. A span from one safe character to the next is normalized alone: decompose, sort
// each run of marks by combining order (stable), compose. An entry of a span is a code point, with
// its combining order above bit 21. Marks are sorted by counting, so a megabyte of accents takes no
// longer than a megabyte of letters.

enum { HANGUL_S = 0xAC00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11A7 };

// The combining order of c; 0: a starter, not a mark.
static unsigned order_of(const Tokenizer *t, uint32_t c) {
    size_t low = 0, high = t->n_order;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (c < t->order[mid].first) high = mid;
        else if (c >= t->order[mid].end) low = mid + 1;
        else return t->order[mid].order;
    }
    return 0;
}

// Writes the full decomposition of c, at most 4 entries; returns how many.
static size_t decompose(const Tokenizer *t, uint32_t c, uint32_t *out) {
    if (c >= HANGUL_S && c < HANGUL_S + 11172) {
        uint32_t s = c - HANGUL_S;
        out[0] = HANGUL_L + s / 588;
        out[1] = HANGUL_V + s % 588 / 28;
        out[2] = HANGUL_T + s % 28;
        return s % 28 ? 3 : 2;
    }
    size_t low = 0, high = c < 0xC0 ? 0 : t->n_part;
    while (low < high) {
        size_t mid = (low + high) / 2;
        const UnicodePart *part = &t->part[mid];
        if (c < part->c) high = mid;
        else if (c > part->c) low = mid + 1;
        else {
            size_t n = decompose(t, part->a, out);
            if (part->b) out[n++] = part->b | (uint32_t)order_of(t, part->b) << 21;
            return n;
        }
    }
    out[0] = c | (uint32_t)order_of(t, c) << 21;
    return 1;
}

// The character that a, b compose to, or 0.
static uint32_t compose(const Tokenizer *t, uint32_t a, uint32_t b) {
    if (a - HANGUL_L < 19 && b - HANGUL_V < 21)
        return HANGUL_S + ((a - HANGUL_L) * 21 + (b - HANGUL_V)) * 28;
    if (a - HANGUL_S < 11172 && (a - HANGUL_S) % 28 == 0 && b - HANGUL_T - 1 < 27)
        return a + (b - HANGUL_T);
    uint64_t ab = (uint64_t)a << 32 | b;
    size_t low = 0, high = t->n_compose;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (t->compose[mid].ab < ab) low = mid + 1;
        else high = mid;
    }
    return low < t->n_compose && t->compose[low].ab == ab ? t->compose[low].c : 0;
}

// Sorts marks by their order, with a stable counting sort.
static int sort_marks(Encoder *e, uint32_t *mark, size_t n) {
    size_t place[65] = {0};
    if (scratch_fit(&e->sorted, n * sizeof *mark) < 0) return -1;
    uint32_t *sorted = e->sorted.data;
    for (size_t i = 0; i < n; i++) place[(mark[i] >> 21) + 1]++;
    for (int k = 1; k < 65; k++) place[k] += place[k - 1];
    for (size_t i = 0; i < n; i++) sorted[place[mark[i] >> 21]++] = mark[i];
    memcpy(mark, sorted, n * sizeof *mark);
    return 0;
}

// Normalizes one span and writes it into e->normal at *n_out.
static int nfc_span(Encoder *e, const unsigned char *s, const unsigned char *end, size_t *n_out) {
    const Tokenizer *t = e->t;
    size_t n = 0, n_after = 0, starter = SIZE_MAX;
    unsigned last = 0;
    while (s < end) {
        if (scratch_fit(&e->span, (n + 4) * sizeof(uint32_t)) < 0) return -1;
        n += decompose(t, utf8_next(&s), (uint32_t *)e->span.data + n);
    }
    uint32_t *span = e->span.data;
    for (size_t i = 0, j; i < n; i = j + 1) {
        j = i;
        while (j < n && span[j] >> 21) j++;
        if (j - i > 1 && sort_marks(e, span + i, j - i) < 0) return -1;
    }
    // A mark combines with the starter only if all marks between them have a lower order.
    for (size_t i = 0; i < n; i++) {
        uint32_t c = span[i] & 0x1FFFFF, joined = 0;
        unsigned order = span[i] >> 21;
        if (starter != SIZE_MAX && (n_after == starter + 1 || last < order))
            joined = compose(t, span[starter], c);
        if (joined) {
            span[starter] = joined;
            continue;
        }
        if (order == 0) starter = n_after;
        span[n_after++] = c;
        last = order;
    }
    if (scratch_fit(&e->normal, *n_out + 4 * n_after) < 0) return -1;
    for (size_t i = 0; i < n_after; i++)
        *n_out += utf8_write(span[i], (unsigned char *)e->normal.data + *n_out);
    return 0;
}

// Marks bytes `from` to `to` of a changed text: copies the marks of user, or sets all to `all`.
static int mark_user(Scratch *marks, size_t from, size_t to, const unsigned char *user, int all) {
    if (scratch_fit(marks, to) < 0) return -1;
    unsigned char *out = (unsigned char *)marks->data + from;
    if (to > from && user) memcpy(out, user, to - from);
    else if (to > from) memset(out, all, to - from);
    return 0;
}

// Replaces *text by its NFC: the text itself if nothing changes, else a copy in e->normal. *user
// (NULL: no marks) follows it.
static int nfc(Encoder *e, const unsigned char **text, const unsigned char **user, size_t *n) {
    const unsigned char *s = *text, *end = s + *n, *copied = s, *safe = NULL, *here;
    size_t n_out = 0;
    while (s < end) {
        here = s;
        if (!(next_class(e->t, &s) & NFC_UNSAFE)) {
            safe = here;
            continue;
        }
        const unsigned char *from =
            safe ? safe : here; // the span starts at the last safe character
        while (s < end) {
            here = s;
            if (!(next_class(e->t, &s) & NFC_UNSAFE)) {
                s = here;
                break;
            }
        }
        size_t plain = (size_t)(from - copied), at = n_out;
        if (scratch_fit(&e->normal, n_out + plain) < 0) return -1;
        if (plain) memcpy((unsigned char *)e->normal.data + n_out, copied, plain);
        n_out += plain;
        if (nfc_span(e, from, s, &n_out) < 0) return -1;
        if (*user) { // one byte of the user in a span makes all of it the user's
            int any = memchr(*user + (from - *text), 1, (size_t)(s - from)) != NULL;
            if (mark_user(&e->normal_user, at, at + plain, *user + (copied - *text), 0) < 0 ||
                mark_user(&e->normal_user, at + plain, n_out, NULL, any) < 0)
                return -1;
        }
        copied = s;
    }
    if (copied == *text) return 0;
    size_t rest = (size_t)(end - copied);
    if (scratch_fit(&e->normal, n_out + rest) < 0) return -1;
    if (rest) memcpy((unsigned char *)e->normal.data + n_out, copied, rest);
    if (*user) {
        if (mark_user(&e->normal_user, n_out, n_out + rest, *user + (copied - *text), 0) < 0)
            return -1;
        *user = e->normal_user.data;
    }
    *text = e->normal.data;
    *n = n_out + rest;
    return 0;
}

static bool is_2581(const unsigned char *s, const unsigned char *end) {
    return end - s >= 3 && s[0] == 0xE2 && s[1] == 0x96 && s[2] == 0x81;
}

// The first U+2581 from s on, or end.
static const unsigned char *find_2581(const unsigned char *s, const unsigned char *end) {
    while (end - s >= 3 && (s = memchr(s, 0xE2, (size_t)(end - s) - 2)) != NULL) {
        if (is_2581(s, end)) return s;
        s++;
    }
    return end;
}

// Puts a space before *text and turns each U+2581 into a space, as asked: the text itself if
// nothing changes, else a copy in `to`.
static int respace(Encoder *e, Scratch *to, bool prefix, bool all, const unsigned char **text,
                   const unsigned char **user, size_t *n) {
    const unsigned char *s = *text, *end = s + *n;
    if (!prefix && (!all || find_2581(s, end) == end)) return 0;
    if (scratch_fit(to, *n + 1) < 0 || (*user && scratch_fit(&e->spaced_user, *n + 1) < 0))
        return -1;
    unsigned char *out = to->data, *marks = *user ? e->spaced_user.data : NULL;
    size_t n_out = 0;
    if (prefix) {
        if (marks) marks[0] = **user;
        out[n_out++] = ' ';
    }
    while (s < end) {
        const unsigned char *next = all ? find_2581(s, end) : end;
        size_t plain = (size_t)(next - s);
        memcpy(out + n_out, s, plain);
        if (marks) memcpy(marks + n_out, *user + (s - *text), plain);
        n_out += plain;
        s = next;
        if (s == end) break;
        if (marks) marks[n_out] = (*user)[s - *text];
        out[n_out++] = ' ';
        s += 3;
    }
    if (marks) *user = marks;
    *text = out;
    *n = n_out;
    return 0;
}
