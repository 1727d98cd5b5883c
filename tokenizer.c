// clang-format off
// tokenizer.c: text to ids and back, byte for byte as the `tokenizers` library does it.
//
// What it is: the tokenizers of Mamba checkpoints. Byte-level BPE (GPT-NeoX, Falcon-Mamba, GPT-4,
// Llama 3, Qwen2), BPE of characters (Llama 2 and Mistral, once made by SentencePiece), whole words
// (k-mers of DNA), and plain bytes.
// What it is not: a trainer (see dev/train_bpe.py). It knows no other model, normalizer or
// pre-tokenizer. export.py refuses a tokenizer that cannot be reproduced exactly.
//
// mamba.c includes this file. Before it come fail(), u32_at() and files/memory.h.
//
// A text goes through five steps. Only the ids are kept for the whole text.
//   1. Added tokens cut the raw text.
//   2. The normalizer, if there is one, changes each part: NFC, or the spaces of Llama 2.
//   3. Added tokens cut the normalized part.
//   4. The pre-tokenizer cuts it into words.
//   5. Merges, in the order of their ranks, turn each word into ids.
//
// Contents: 1. memory  2. the blob, opened and checked  3. merges  4. words  5. added tokens
//           6. encode  7. streaming decode. Characters and normalizers: files/text.h
//
// SentencePiece writes a space as U+2581. Its tokens are stored with spaces, and texts are encoded
// with spaces: what the library turns into U+2581 stays a space here, and a U+2581 of the text
// becomes a space. A text without U+2581 is not copied.
//
// The blob is what export.py writes, inside model.bin or as a file of its own. Little-endian:
//    0  char[4]  "mtok"
//    4  u32      version: 1; or 2, which has the fields from 32 to 63
//    8  u32      kind: 0 = bytes (the id is the byte; the blob ends at 32), 1 = byte-level BPE,
//                2 = BPE of characters, 3 = words. Version 1 has the kinds 0 and 1 only
//   12  u32      flags, see TOKENIZER_NFC and following; version 1 has bits 0 and 1 only
//   16  u32      how words are cut. Version 1: 1 = GPT-2, 2 = Falcon; 0 with kind 0.
//                Version 2: up to four steps, a byte each, the first in the lowest; see STEP_GPT2
//   20  u32      n_ids: the largest id + 1
//   24  u32      n_merges
//   28  u32      n_added
//   32  i32      version 2: the id that goes before a prompt, or -1
//   36  i32      version 2: the id of what has no token, or -1
//   40  u32      version 2: bytes at the end of the blob that are not the tokenizer: a chat
//                template (doc/FORMAT.md), what only export.py reads
//   44  20 zeros in version 2
//   then n_ids tokens: u32 length, then the bytes of the token
//         0xFFFFFFFF: a hole, the id has no token
//         bit 31: a literal, see below; bit 30: one byte, the token <0xNN> (kind 2)
//       i32 byte_id[256] (not kind 3): the id of each byte's symbol (kind 1) or of <0xNN> (kind 2),
//         or -1. The library drops bytes without a symbol, and so does this file.
//       n_merges times u32 left, u32 right, u32 result. The index is the rank.
//       n_added times u32 id, u32 flags, u32 length, then the UTF-8 text to match
//         flags: bit 0 special, 1 lstrip, 2 rstrip, 3 single_word, 4 normalized, 5 not in the
//         model's vocabulary
// Most tokens are stored as the bytes that they stand for. A literal is a token that no word can
// give. Kind 1: one with characters outside the byte alphabet, for example the double spaces of
// GPT-NeoX. Kind 2 with DECODE_SPACES: one with a real space. It stands for its own UTF-8.
// clang-format on

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENIZER_BYTES, TOKENIZER_BPE, TOKENIZER_CHARS, TOKENIZER_WORDS };
enum { // flags. The last six say how spaces come and go, where a space is a U+2581
    TOKENIZER_NFC = 1,
    TOKENIZER_PREFIX_SPACE = 2, // before a part that does not begin with a space
    IGNORE_MERGES = 4,          // a word that is a token is that token
    FUSE_UNKNOWN = 8,           // unknown characters in a row are one id
    BYTE_FALLBACK = 16,         // a character without a token is its bytes
    FIRST_PREFIX = 32,          // PREFIX_SPACE at the start of the text only
    NORMAL_SPACES = 64,         // the normalizer turns spaces into U+2581
    NORMAL_PREFIX = 128,        // and puts one before each part
    WORD_SPACES = 256,          // the pre-tokenizer turns spaces into U+2581
    DECODE_SPACES = 512,        // the decoder turns U+2581 into a space
    DECODE_STRIP = 1024,        // and drops one space at the start of a text
    DECODE_STRIP_TOKEN = 2048,  // or all spaces of the first token
    DECODE_JOIN = 4096,         // it puts a space between two tokens
    TOKENIZER_FLAGS = 8191,
};
enum { // how a text is cut into words: steps, each of which cuts the pieces of the one before
    STEP_GPT2 = 1,
    STEP_GPT4,    // and Llama 3
    STEP_QWEN2,   // the same, but each digit is a word
    STEP_NUMBERS, // runs of digits, and what is between them
    STEP_DIGITS,  // each digit, and what is between them
    STEP_PUNCT,   // runs of punctuation, and what is between them
    STEP_FALCON,  // the last one: sees bytes
    STEP_WORDS,   // runs of word characters, runs of others; spaces are dropped
    STEP_BLANKS,  // what stands between white space
    STEP_SPACES,  // before each space
    STEP_CHARS,   // each character
    N_STEPS,
    STEP_SAFE = N_STEPS // the last one, added by open_cuts()
};
enum {
    ADDED_SPECIAL = 1,
    ADDED_LSTRIP = 2,
    ADDED_RSTRIP = 4,
    ADDED_SINGLE_WORD = 8,
    ADDED_NORMALIZED = 16,
    ADDED_OUTSIDE = 32
};
#define TOKENIZER_HOLE 0xFFFFFFFFu
#define TOKENIZER_LITERAL 0x80000000u
#define TOKENIZER_ONE_BYTE 0x40000000u
// Limits. A search may walk through a whole added token at each byte of the text. Each byte of an
// added token may take a node of the trie.
enum { ADDED_MAX_LENGTH = 512, ADDED_MAX_BYTES = 1 << 20 };

typedef struct {
    uint32_t left, right, rank, result; // rank UINT32_MAX: an empty slot
} MergePair;
typedef struct {
    uint32_t c, a, b; // c decomposes to a, b; b = 0: to a alone
} UnicodePart;
typedef struct {
    uint64_t ab; // a << 32 | b
    uint32_t c;  // a, b compose to c
} UnicodePair;
typedef struct {
    uint32_t first, end; // combining marks first to end - 1
    unsigned order;
} UnicodeOrder;
typedef struct {
    uint32_t id, flags;
} AddedToken;
typedef struct {
    uint32_t child, sibling, added; // 0: no child, no sibling; added UINT32_MAX: no token ends here
    unsigned char byte;
} TrieNode;
typedef struct {
    TrieNode *node; // node 0 is the root
    uint32_t n, capacity;
    bool starts[256]; // the first bytes of all strings
} Trie;

typedef struct Tokenizer {
    uint32_t version, kind, flags, cuts, n_ids, n_merges, n_added;
    int32_t bos, unknown; // -1: none
    int n_steps;
    unsigned char step[4], joins[256][256 / 8]; // see open_cuts()
    const unsigned char *blob;
    const unsigned char *chat; // (chat_bytes) in the blob, for files/chat.h; NULL: none
    uint32_t chat_bytes;
    uint32_t *token_at;          // (n_ids) offset of each token in the blob
    const unsigned char *merges; // (n_merges, 3) in the blob
    unsigned char byte[256];     // kind 0: the byte of each id
    int32_t byte_id[256];
    int32_t ascii[128]; // kind 2: the ids of ASCII characters
    uint32_t *by_bytes; // hash table of 1 << by_bytes_bits ids: a token by its bytes. Or NULL
    int by_bytes_bits;
    MergePair *pair; // hash table with open addressing, 1 << pair_bits slots, at most half full
    int pair_bits;
    AddedToken *added;
    Trie raw, normalized;   // added tokens matched before and after the normalizer
    uint16_t page[0x1100];  // Unicode classes: the page of each 256 code points
    unsigned char *classes; // (pages, 256) the class bits of each code point
    UnicodeOrder *order;
    UnicodePart *part;
    UnicodePair *compose;
    uint32_t n_order, n_part, n_compose;
} Tokenizer;

// -------------------------------------------------------------------------------------------------
// 1. The memory of one call of tokenizer_encode(). A text that is its own NFC is never copied.

// A text of at least CACHE_FROM bytes gets a cache of words. For shorter ones it does not pay.
enum { CACHE_SLOTS = 4096, CACHE_BYTES = 22, CACHE_IDS = 6, CACHE_FROM = 4096 };
typedef struct {
    unsigned char n_bytes, n_ids, bytes[CACHE_BYTES];
    int32_t ids[CACHE_IDS];
} CacheSlot;
typedef struct {
    void *data;
    size_t bytes;
} Scratch;

typedef struct {
    const Tokenizer *t;
    int32_t *ids;
    size_t n_ids, capacity;
    CacheSlot *cache;         // words of this text; NULL for a short one
    bool at_start;            // the part begins where the text begins
    Scratch normal;           // a part after NFC
    Scratch spaced, prefixed; // after the normalizer's spaces; after those of the pre-tokenizer
    Scratch normal_user, spaced_user; // whose bytes they are, see encode_section()
    Scratch span, sorted;             // code points between two safe ones; a sorted run of marks
    Scratch long_word;                // the list and the heap of a long word
} Encoder;

// Makes room for at least `bytes` and keeps the content. It grows by half, so appending takes
// linear time.
static int scratch_fit(Scratch *s, size_t bytes) {
    if (bytes <= s->bytes) return 0;
    size_t room = bytes + s->bytes / 2;
    void *grown = memory_grow(s->data, room);
    if (grown == NULL) return fail("tokenizer: out of memory (%zu bytes)", room);
    s->data = grown;
    s->bytes = room;
    return 0;
}

static int push_ids(Encoder *e, const int32_t *ids, size_t n) {
    if (e->capacity - e->n_ids < n) {
        size_t room = e->capacity + e->capacity / 2 + n + 16;
        int32_t *grown = memory_grow(e->ids, room * sizeof *grown);
        if (grown == NULL) return fail("tokenizer: out of memory (%zu ids)", room);
        e->ids = grown;
        e->capacity = room;
    }
    for (size_t i = 0; i < n; i++) e->ids[e->n_ids++] = ids[i]; // few ids: faster than memcpy
    return 0;
}

static void encoder_free(Encoder *e) {
    memory_free(e->cache);
    memory_free(e->normal.data);
    memory_free(e->spaced.data);
    memory_free(e->prefixed.data);
    memory_free(e->normal_user.data);
    memory_free(e->spaced_user.data);
    memory_free(e->span.data);
    memory_free(e->sorted.data);
    memory_free(e->long_word.data);
}

#include "files/text.h"

// -------------------------------------------------------------------------------------------------
// 2. The blob. Every length is compared with the bytes that are left, and every id with n_ids,
// before it is used. More facts are checked because the encoder relies on them: a merge joins
// exactly the bytes of its two parts (so an old entry of the merge heap is never taken for a new
// one), byte symbols are single bytes, no two tokens that words can give are the same, and added
// tokens agree with the id that they name.

// The stored bytes of a token; NULL for a hole. marks: TOKENIZER_LITERAL, TOKENIZER_ONE_BYTE or 0.
static const unsigned char *token_bytes(const Tokenizer *t, uint32_t id, size_t *n,
                                        uint32_t *marks) {
    const unsigned char *at = t->blob + t->token_at[id];
    const uint32_t length = u32_at(at), all = TOKENIZER_LITERAL | TOKENIZER_ONE_BYTE;
    *n = length == TOKENIZER_HOLE ? 0 : length & ~all;
    *marks = length == TOKENIZER_HOLE ? 0 : length & all;
    return length == TOKENIZER_HOLE ? NULL : at + 4;
}

// Whether a token with this text (checked UTF-8) is a literal.
static bool is_literal(const Tokenizer *t, const unsigned char *s, size_t n) {
    if (t->kind != TOKENIZER_BPE) return t->flags & DECODE_SPACES && memchr(s, ' ', n);
    for (const unsigned char *end = s + n; s < end;)
        if (alphabet_byte(utf8_next(&s)) < 0) return true;
    return false;
}

// Whether the token of an id is well formed.
static bool token_is_good(const Tokenizer *t, uint32_t id) {
    size_t n;
    uint32_t marks;
    const unsigned char *token = token_bytes(t, id, &n, &marks);
    if (marks == TOKENIZER_ONE_BYTE) return t->kind == TOKENIZER_CHARS && n == 1;
    if (marks == TOKENIZER_LITERAL) return utf8_check(token, n) == n && is_literal(t, token, n);
    if (marks || t->kind == TOKENIZER_BPE) return !marks;
    return utf8_check(token, n) == n &&
           !(t->flags & DECODE_SPACES && find_2581(token, token + n) < token + n);
}

// Reads the tokens and the byte symbols, from offset *at on.
static int open_tokens(Tokenizer *t, size_t bytes, size_t *at) {
    if (t->n_ids == 0 || t->n_ids > (bytes - *at) / 4)
        return fail("tokenizer: %u ids do not fit its %zu bytes", t->n_ids, bytes);
    t->token_at = memory_get(t->n_ids * sizeof *t->token_at);
    if (t->token_at == NULL) return fail("tokenizer: out of memory");
    for (uint32_t id = 0; id < t->n_ids; id++) {
        if (bytes - *at < 4) return fail("tokenizer: it ends within the token of id %u", id);
        uint32_t length = u32_at(t->blob + *at);
        uint32_t n = length & ~(TOKENIZER_LITERAL | TOKENIZER_ONE_BYTE);
        t->token_at[id] = (uint32_t)*at;
        *at += 4;
        if (length == TOKENIZER_HOLE) continue;
        if (n == 0 || n > bytes - *at)
            return fail("tokenizer: the token of id %u has a bad length", id);
        if (!token_is_good(t, id)) return fail("tokenizer: the token of id %u is damaged", id);
        *at += n;
    }
    if (u32_at(t->blob + t->token_at[t->n_ids - 1]) == TOKENIZER_HOLE)
        return fail("tokenizer: its last id is a hole");
    if (t->kind == TOKENIZER_WORDS) return 0;
    if (bytes - *at < 256 * 4) return fail("tokenizer: it ends within the byte symbols");
    for (int b = 0; b < 256; b++, *at += 4) {
        uint32_t id = u32_at(t->blob + *at);
        const uint32_t want = t->kind == TOKENIZER_CHARS ? TOKENIZER_ONE_BYTE : 0;
        size_t n;
        uint32_t marks;
        t->byte_id[b] = id == UINT32_MAX ? -1 : (int32_t)id;
        if (id == UINT32_MAX) continue;
        const unsigned char *token = id < t->n_ids ? token_bytes(t, id, &n, &marks) : NULL;
        if (token == NULL || n != 1 || marks != want || *token != b)
            return fail("tokenizer: id %u is not the symbol of byte %d", id, b);
    }
    return 0;
}

static inline uint32_t pair_slot(const Tokenizer *t, uint32_t left, uint32_t right) {
    return (uint32_t)((((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u) >>
                      (64 - t->pair_bits));
}

// The merge of two ids, or a slot with rank UINT32_MAX.
static inline const MergePair *find_pair(const Tokenizer *t, uint32_t left, uint32_t right) {
    uint32_t slot = pair_slot(t, left, right), mask = (1u << t->pair_bits) - 1;
    while (t->pair[slot].rank != UINT32_MAX &&
           (t->pair[slot].left != left || t->pair[slot].right != right))
        slot = (slot + 1) & mask;
    return &t->pair[slot];
}

// Checks the merges and fills the hash table of pairs.
static int open_merges(Tokenizer *t, size_t bytes, size_t *at) {
    if (t->n_merges > (bytes - *at) / 12)
        return fail("tokenizer: %u merges do not fit its %zu bytes", t->n_merges, bytes);
    t->pair_bits = 4;
    while (((size_t)1 << t->pair_bits) < 2 * (size_t)t->n_merges) t->pair_bits++;
    size_t slots = (size_t)1 << t->pair_bits;
    t->pair = memory_get(slots * sizeof *t->pair);
    if (t->pair == NULL) return fail("tokenizer: out of memory");
    memset(t->pair, 0xFF, slots * sizeof *t->pair); // all ranks are UINT32_MAX
    t->merges = t->blob + *at;
    for (uint32_t rank = 0; rank < t->n_merges; rank++, *at += 12) {
        uint32_t id[3];
        const unsigned char *token[3];
        size_t n[3];
        uint32_t marks[3];
        bool good = true;
        for (int k = 0; k < 3 && good; k++) {
            id[k] = u32_at(t->blob + *at + 4 * k);
            token[k] = id[k] < t->n_ids ? token_bytes(t, id[k], &n[k], &marks[k]) : NULL;
            good = token[k] != NULL && !marks[k];
        }
        if (!good || n[2] != n[0] + n[1] || memcmp(token[2], token[0], n[0]) ||
            memcmp(token[2] + n[0], token[1], n[1]))
            return fail("tokenizer: merge %u does not join two ids into a third", rank);
        uint32_t slot = pair_slot(t, id[0], id[1]);
        int probes = 0; // the table is half full: only a crafted file makes a run of 1,000 slots
        for (; t->pair[slot].rank != UINT32_MAX; slot = (slot + 1) & (uint32_t)(slots - 1)) {
            if ((t->pair[slot].left != id[0] || t->pair[slot].right != id[1]) && ++probes < 1000)
                continue;
            return fail("tokenizer: merge %u repeats an earlier one or collides with too many",
                        rank);
        }
        t->pair[slot] = (MergePair){id[0], id[1], rank, id[2]};
    }
    return 0;
}

// Adds a string to a trie.
static int trie_add(Trie *trie, const unsigned char *s, size_t n, uint32_t added) {
    uint32_t at = 0;
    if (trie->capacity - trie->n < n + 1) {
        size_t room = trie->capacity + trie->capacity / 2 + n + 1;
        TrieNode *grown = memory_grow(trie->node, room * sizeof *grown);
        if (grown == NULL) return fail("tokenizer: out of memory");
        trie->node = grown;
        trie->capacity = (uint32_t)room;
    }
    if (trie->n == 0) trie->node[trie->n++] = (TrieNode){0, 0, UINT32_MAX, 0};
    trie->starts[s[0]] = true;
    for (size_t i = 0; i < n; i++) {
        uint32_t *link = &trie->node[at].child;
        while (*link && trie->node[*link].byte != s[i]) link = &trie->node[*link].sibling;
        if (*link == 0) {
            *link = trie->n;
            trie->node[trie->n++] = (TrieNode){0, 0, UINT32_MAX, s[i]};
        }
        at = *link;
    }
    if (trie->node[at].added != UINT32_MAX)
        return fail("tokenizer: added tokens %u and %u are the same text", trie->node[at].added,
                    added);
    trie->node[at].added = added;
    return 0;
}

// Whether the library decodes a token with this text to the bytes that are stored for the id.
static bool text_matches_id(const Tokenizer *t, const unsigned char *s, size_t n, uint32_t id) {
    size_t n_token, k = 0;
    uint32_t marks;
    const unsigned char *token = id < t->n_ids ? token_bytes(t, id, &n_token, &marks) : NULL,
                        *end = s + n;
    if (token == NULL || marks != (is_literal(t, s, n) ? TOKENIZER_LITERAL : 0)) return false;
    if (marks) return n_token == n && memcmp(token, s, n) == 0;
    while (s < end && k < n_token) {
        const bool space = t->flags & DECODE_SPACES && is_2581(s, end);
        const int b = t->kind == TOKENIZER_BPE ? alphabet_byte(utf8_next(&s)) : space ? ' ' : *s++;
        if (space) s += 3;
        if (b != token[k++]) return false;
    }
    return s == end && k == n_token;
}

// Adds a token to the trie that finds it. One with the flag `normalized` is found in normalized
// text, so its spaces change, too, and it is decoded as it is found.
static int open_added_token(Tokenizer *t, Encoder *e, uint32_t i, const unsigned char *s,
                            size_t n) {
    const uint32_t id = t->added[i].id, flags = t->flags;
    const unsigned char *user = NULL;
    const bool is_normal = t->added[i].flags & ADDED_NORMALIZED;
    size_t n_token;
    uint32_t marks;
    if (is_normal &&
        respace(e, &e->spaced, flags & NORMAL_PREFIX, flags & NORMAL_SPACES, &s, &user, &n))
        return -1;
    const unsigned char *token = id < t->n_ids ? token_bytes(t, id, &n_token, &marks) : NULL;
    const bool same = is_normal && flags & NORMAL_SPACES
                          ? token && !marks && n_token == n && memcmp(token, s, n) == 0
                          : text_matches_id(t, s, n, id);
    if (!same) return fail("tokenizer: added token %u disagrees with id %u", i, id);
    return trie_add(is_normal ? &t->normalized : &t->raw, s, n, i);
}

// Checks one added token. The library matches a `normalized` token by its NFC, and its version
// decides which form it decodes to. So such a token is accepted only if it is its own NFC.
static int check_added(const Tokenizer *t, Encoder *e, uint32_t i, uint32_t flags,
                       const unsigned char *s, size_t n) {
    const unsigned char *same = s, *user = NULL;
    size_t n_same = n;
    if (flags > 63) return fail("tokenizer: added token %u has unknown flags", i);
    if (utf8_check(s, n) != n) return fail("tokenizer: added token %u is not UTF-8", i);
    if (!(flags & ADDED_NORMALIZED && t->flags & TOKENIZER_NFC)) return 0;
    if (nfc(e, &same, &user, &n_same) < 0) return -1;
    return n_same == n && memcmp(same, s, n) == 0 ? 0
                                                  : fail("tokenizer: added token %u is not NFC", i);
}

// Reads the added tokens and builds the two tries.
static int open_added(Tokenizer *t, size_t bytes, size_t *at) {
    Encoder e = {.t = t};
    int status = 0;
    if (t->n_added > (bytes - *at) / 12 || bytes - *at > ADDED_MAX_BYTES)
        return fail("tokenizer: %u added tokens in %zu bytes", t->n_added, bytes - *at);
    t->added = memory_get((t->n_added + 1) * sizeof *t->added);
    if (t->added == NULL) return fail("tokenizer: out of memory");
    for (uint32_t i = 0; i < t->n_added && status == 0; i++) {
        const unsigned char *p = t->blob + *at, *s;
        uint32_t n = bytes - *at < 12 ? 0 : u32_at(p + 8);
        if (n == 0 || n > ADDED_MAX_LENGTH || n > bytes - *at - 12) {
            status = fail("tokenizer: added token %u has a bad length", i);
            break;
        }
        s = p + 12;
        t->added[i] = (AddedToken){u32_at(p), u32_at(p + 4)};
        *at += 12 + (size_t)n;
        status = check_added(t, &e, i, t->added[i].flags, s, n);
        if (status == 0) status = open_added_token(t, &e, i, s, n);
    }
    encoder_free(&e);
    return status;
}

static void tokenizer_close(Tokenizer *t) {
    if (t == NULL) return;
    memory_free(t->token_at);
    memory_free(t->pair);
    memory_free(t->by_bytes);
    memory_free(t->added);
    memory_free(t->raw.node);
    memory_free(t->normalized.node);
    memory_free(t->classes);
    memory_free(t->order);
    memory_free(t->part);
    memory_free(t->compose);
    memory_free(t);
}

static int tokenizer_size(const Tokenizer *t) { return (int)t->n_ids; }

UNUSED static bool tokenizer_is_bytes(const Tokenizer *t) { return t->kind == TOKENIZER_BYTES; }

UNUSED static const char *tokenizer_name(const Tokenizer *t) {
    static const char *const name[] = {"bytes", "byte-level BPE", "BPE of characters", "words"};
    return name[t->kind];
}

// The bytes that an id stands for; NULL and 0 for a hole or an id out of range.
static const unsigned char *tokenizer_token(const Tokenizer *t, int id, size_t *bytes) {
    uint32_t marks;
    *bytes = 0;
    if (id < 0 || (uint32_t)id >= t->n_ids) return NULL;
    if (t->kind != TOKENIZER_BYTES) return token_bytes(t, (uint32_t)id, bytes, &marks);
    *bytes = 1;
    return &t->byte[id];
}

static bool tokenizer_has(const Tokenizer *t, int id) {
    size_t bytes;
    return tokenizer_token(t, id, &bytes) != NULL;
}

static uint32_t hash_bytes(const unsigned char *s, size_t n) {
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ s[i]) * 16777619u;
    return hash ^ hash >> 15;
}

// The slot of by_bytes with the token of these bytes, or the empty one that ends the search.
static uint32_t *find_slot(const Tokenizer *t, const unsigned char *s, size_t n, int *probes) {
    const uint32_t mask = (1u << t->by_bytes_bits) - 1;
    uint32_t slot = hash_bytes(s, n) & mask, marks;
    size_t n_token;
    for (*probes = 0; t->by_bytes[slot] != TOKENIZER_HOLE; slot = (slot + 1) & mask, ++*probes) {
        const unsigned char *token = token_bytes(t, t->by_bytes[slot], &n_token, &marks);
        if (n_token == n && memcmp(token, s, n) == 0) break;
    }
    return &t->by_bytes[slot];
}

// The id of the token with these bytes, or -1.
static int32_t find_token(const Tokenizer *t, const unsigned char *s, size_t n) {
    int probes;
    return (int32_t)*find_slot(t, s, n, &probes); // an empty slot is -1
}

// Fills by_bytes with the tokens that words can give: not literals, not <0xNN>, and not added
// tokens that the model's vocabulary lacks.
static int open_by_bytes(Tokenizer *t) {
    t->by_bytes_bits = 4;
    while (((size_t)1 << t->by_bytes_bits) < 2 * (size_t)t->n_ids) t->by_bytes_bits++;
    size_t slots = (size_t)1 << t->by_bytes_bits;
    unsigned char *outside = memory_zeroed(t->n_ids, 1);
    t->by_bytes = memory_get(slots * sizeof *t->by_bytes);
    if (t->by_bytes == NULL || outside == NULL) {
        memory_free(outside);
        return fail("tokenizer: out of memory");
    }
    memset(t->by_bytes, 0xFF, slots * sizeof *t->by_bytes);
    for (uint32_t i = 0; i < t->n_added; i++)
        if (t->added[i].flags & ADDED_OUTSIDE) outside[t->added[i].id] = 1;
    int status = 0;
    for (uint32_t id = 0; id < t->n_ids && status == 0; id++) {
        size_t n;
        uint32_t marks;
        int probes;
        const unsigned char *token = token_bytes(t, id, &n, &marks);
        if (token == NULL || marks || outside[id]) continue;
        uint32_t *slot = find_slot(t, token, n, &probes);
        if (*slot != TOKENIZER_HOLE)
            status = fail("tokenizer: ids %u and %u are the same token", *slot, id);
        else if (probes > 1000) // only a crafted file
            status = fail("tokenizer: id %u collides with too many", id);
        else *slot = id;
    }
    memory_free(outside);
    for (unsigned char c = 0; c < 128 && status == 0; c++) t->ascii[c] = find_token(t, &c, 1);
    return status;
}

// Without a pre-tokenizer a whole text is one word. Where no merge joins what ends with one byte to
// what begins with another, a cut between the two changes no id, and short words are faster: so
// t->joins has a bit for each pair of bytes that no cut may part. After an unknown character there
// is no cut either, because several of them may become one id.
static void open_cuts(Tokenizer *t) {
    const bool chars = t->kind == TOKENIZER_CHARS;
    if (t->kind == TOKENIZER_WORDS || t->flags & IGNORE_MERGES || t->n_steps == 4) return;
    if (!chars && t->n_steps > 0) return;
    for (int a = 0; a < 256; a++)
        if (chars ? a >= 128 || t->ascii[a] < 0 : t->byte_id[a] < 0)
            memset(t->joins[a], 0xFF, sizeof t->joins[a]);
        else if (chars) memset(t->joins[a] + 0x80 / 8, 0xFF, 0x40 / 8); // inside a character
    for (uint32_t rank = 0; rank < t->n_merges; rank++) {
        const unsigned char *merge = t->merges + 12 * (size_t)rank;
        size_t n, m;
        uint32_t marks;
        const unsigned char *left = token_bytes(t, u32_at(merge), &n, &marks);
        const unsigned char *right = token_bytes(t, u32_at(merge + 4), &m, &marks);
        t->joins[left[n - 1]][right[0] >> 3] |= (unsigned char)(1 << (right[0] & 7));
    }
    t->step[t->n_steps++] = STEP_SAFE;
}

// Reads the steps from t->cuts.
static int open_steps(Tokenizer *t) {
    if (t->version == 1) {
        static const uint32_t falcon = STEP_PUNCT | STEP_GPT2 << 8 | STEP_FALCON << 16;
        if (t->cuts < 1 || t->cuts > 2) return fail("tokenizer: unknown pretokenizer %u", t->cuts);
        t->cuts = t->cuts == 1 ? STEP_GPT2 : falcon;
    }
    for (uint32_t left = t->cuts; left; left >>= 8) {
        t->step[t->n_steps++] = (unsigned char)left;
        if ((left & 255) == 0 || (left & 255) >= N_STEPS ||
            ((left & 255) == STEP_FALCON && (left >> 8 || t->kind != TOKENIZER_BPE)))
            return fail("tokenizer: unknown pretokenizer %u", t->cuts);
    }
    return 0;
}

static int open_blob(Tokenizer *t, size_t bytes, size_t at) {
    const bool one = t->version == 1;
    if (t->kind == TOKENIZER_BYTES) {
        if (bytes == 32 && one && !t->flags && !t->cuts && t->n_ids >= 1 && t->n_ids <= 256 &&
            !t->n_merges && !t->n_added)
            return 0;
        return fail("tokenizer: a bytes tokenizer has 1 to 256 ids, no settings and 32 bytes");
    }
    if (t->kind > (one ? TOKENIZER_BPE : TOKENIZER_WORDS))
        return fail("tokenizer: unknown kind %u", t->kind);
    if (open_steps(t)) return -1;
    if (t->flags > (one ? 3 : TOKENIZER_FLAGS) ||
        (t->flags & TOKENIZER_PREFIX_SPACE && one && t->cuts != STEP_GPT2))
        return fail("tokenizer: unknown flags %u", t->flags);
    const uint32_t spaces = TOKENIZER_FLAGS & ~(FIRST_PREFIX - 1u);
    if ((t->kind != TOKENIZER_CHARS && t->flags & spaces & ~(uint32_t)DECODE_JOIN) ||
        (t->kind == TOKENIZER_WORDS && t->n_merges))
        return fail("tokenizer: kind %u has no flags %u", t->kind, t->flags);
    if (!open_classes(t) || (t->flags & TOKENIZER_NFC && !open_normalizer(t)))
        return fail("tokenizer: out of memory");
    if (open_tokens(t, bytes, &at) || open_merges(t, bytes, &at) || open_added(t, bytes, &at))
        return -1;
    if (at != bytes) return fail("tokenizer: %zu bytes too many at its end", bytes - at);
    if (!tokenizer_has(t, t->bos) && t->bos != -1)
        return fail("tokenizer: no token has id %d, which goes before a prompt", t->bos);
    if (!tokenizer_has(t, t->unknown) && t->unknown != -1)
        return fail("tokenizer: no token has id %d, that of unknown words", t->unknown);
    if ((t->kind != TOKENIZER_BPE || t->flags & IGNORE_MERGES) && open_by_bytes(t)) return -1;
    open_cuts(t);
    return 0;
}

// Reads the fields of version 2, which follow those of version 1. 0, or -1 after fail().
static int open_version_2(Tokenizer *t, size_t *bytes) {
    if (*bytes < 64) return fail("tokenizer: it ends within its header");
    t->bos = (int32_t)u32_at(t->blob + 32);
    t->unknown = (int32_t)u32_at(t->blob + 36);
    for (int i = 44; i < 64; i++)
        if (t->blob[i]) return fail("tokenizer: byte %d of its header is not zero", i);
    uint32_t unread = u32_at(t->blob + 40);
    if (unread > *bytes - 64) return fail("tokenizer: %u bytes at its end do not fit it", unread);
    // A chat template (files/chat.h) is the last of what is not read here: it, its length, "chat".
    const unsigned char *end = t->blob + *bytes;
    if (unread >= 8 && !memcmp(end - 4, "chat", 4)) {
        t->chat_bytes = u32_at(end - 8);
        if (t->chat_bytes > unread - 8) return fail("tokenizer: its chat template does not fit it");
        t->chat = end - 8 - t->chat_bytes;
    }
    *bytes -= unread;
    return 0;
}

// Checks a blob and prepares it for use; NULL after fail(). The tokenizer reads the blob until it
// is closed.
static Tokenizer *tokenizer_open(const unsigned char *blob, size_t bytes) {
    if (bytes < 32 || memcmp(blob, "mtok", 4) != 0) {
        fail("tokenizer: it does not start with \"mtok\"");
        return NULL;
    }
    if (bytes > INT32_MAX) {
        fail("tokenizer: %zu bytes are too many", bytes);
        return NULL;
    }
    if (u32_at(blob + 4) != 1 && u32_at(blob + 4) != 2) {
        fail("tokenizer: version %u, this program reads 1 and 2", u32_at(blob + 4));
        return NULL;
    }
    Tokenizer *t = memory_zeroed(1, sizeof *t);
    if (t == NULL) {
        fail("tokenizer: out of memory");
        return NULL;
    }
    t->blob = blob;
    t->version = u32_at(blob + 4);
    t->kind = u32_at(blob + 8);
    t->flags = u32_at(blob + 12);
    t->cuts = u32_at(blob + 16);
    t->n_ids = u32_at(blob + 20);
    t->n_merges = u32_at(blob + 24);
    t->n_added = u32_at(blob + 28);
    t->bos = t->unknown = -1;
    for (int b = 0; b < 256; b++) t->byte[b] = (unsigned char)b;
    if ((t->version == 1 || open_version_2(t, &bytes) == 0) &&
        open_blob(t, bytes, t->version == 1 ? 32 : 64) == 0)
        return t;
    tokenizer_close(t);
    return NULL;
}

// -------------------------------------------------------------------------------------------------
// 3. Merges. The pair of lowest rank is merged first; of equal ones, the leftmost. In a word of
// usual length a loop finds it. A long word (a megabyte of one letter is one word) has a linked
// list of ids and a heap of rank << 32 | position.

enum { SHORT_WORD = 64 };

// The ids of <0xNN> for the bytes of one character; returns how many, 0 if one of them has none.
static size_t byte_symbols(const Tokenizer *t, const unsigned char *s, size_t n, int32_t *id) {
    for (size_t i = 0; i < n; i++) {
        if (t->byte_id[s[i]] < 0) return 0;
        id[i] = t->byte_id[s[i]];
    }
    return n;
}

// The ids of a word before any merge, a byte (kind 1) or a character each; returns how many. The
// id of an unknown character waits for the next known one. As in the library, bytes do not end the
// wait.
static size_t word_symbols(const Tokenizer *t, const unsigned char *word, size_t bytes,
                           int32_t *id) {
    const unsigned char *end = word + bytes, *here;
    const bool by_byte = t->kind == TOKENIZER_BPE;
    size_t n = 0, n_bytes;
    bool waiting = false;
    while (word < end) {
        here = word;
        if (by_byte || *word < 0x80) word++;
        else utf8_next(&word);
        const int32_t symbol = by_byte        ? t->byte_id[*here]
                               : *here < 0x80 ? t->ascii[*here]
                                              : find_token(t, here, (size_t)(word - here));
        if (symbol >= 0) {
            if (waiting) id[n++] = t->unknown;
            waiting = false;
            id[n++] = symbol;
            continue;
        }
        n_bytes = t->flags & BYTE_FALLBACK && !by_byte
                      ? byte_symbols(t, here, (size_t)(word - here), id + n)
                      : 0;
        n += n_bytes;
        if (n_bytes || t->unknown < 0) continue;
        if (waiting && !(t->flags & FUSE_UNKNOWN)) id[n++] = t->unknown;
        waiting = true;
    }
    if (waiting) id[n++] = t->unknown;
    return n;
}

// Of the merge of two ids: the rank above, the id that results below. Where there is none, the rank
// is UINT32_MAX.
static inline uint64_t merge_of(const Tokenizer *t, int32_t left, int32_t right) {
    const MergePair *pair = find_pair(t, (uint32_t)left, (uint32_t)right);
    return (uint64_t)pair->rank << 32 | pair->result;
}

// Merges n ids in place; returns how many are left.
static size_t merge_short(const Tokenizer *t, int32_t *id, size_t n) {
    uint64_t merge[SHORT_WORD];
    for (size_t i = 0; i + 1 < n; i++) merge[i] = merge_of(t, id[i], id[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (merge[i] < merge[best]) best = i;
        if (merge[best] >> 32 == UINT32_MAX) break;
        id[best] = (int32_t)merge[best];
        n--;
        for (size_t i = best + 1; i < n; i++) id[i] = id[i + 1];
        for (size_t i = best + 1; i + 1 < n; i++) merge[i] = merge[i + 1];
        if (best > 0) merge[best - 1] = merge_of(t, id[best - 1], id[best]);
        if (best + 1 < n) merge[best] = merge_of(t, id[best], id[best + 1]);
    }
    return n;
}

// A heap with four children a node: half the cache misses of one with two.
static void heap_sink(uint64_t *heap, size_t n, size_t i) {
    uint64_t moving = heap[i];
    while (4 * i + 1 < n) {
        size_t first = 4 * i + 1, child = first;
        for (size_t k = first + 1; k < first + 4 && k < n; k++)
            if (heap[k] < heap[child]) child = k;
        if (moving <= heap[child]) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moving;
}

static void heap_push(uint64_t *heap, size_t *n, uint64_t value) {
    size_t i = (*n)++;
    for (; i > 0 && heap[(i - 1) / 4] > value; i = (i - 1) / 4) heap[i] = heap[(i - 1) / 4];
    heap[i] = value;
}

// Merges a long word. An entry of the heap is old if its pair has changed since; the pair then has
// another rank. The heap starts with at most n - 1 entries. Each of at most n - 1 merges removes
// one and adds two, so 2n slots are enough.
static int merge_long(Encoder *e, const unsigned char *word, size_t bytes) {
    const Tokenizer *t = e->t;
    if (bytes >= INT32_MAX) return fail("tokenizer: a word of %zu bytes is too long", bytes);
    if (scratch_fit(&e->long_word, bytes * (2 * sizeof(uint64_t) + 3 * sizeof(int32_t))) < 0)
        return -1;
    uint64_t *heap = e->long_word.data;
    int32_t *id = (int32_t *)(heap + 2 * bytes), *next = id + bytes, *prev = next + bytes;
    int32_t n = (int32_t)word_symbols(t, word, bytes, id);
    size_t n_heap = 0;
    for (int32_t i = 0; i < n; i++) {
        prev[i] = i - 1;
        next[i] = i + 1;
    }
    for (int32_t i = 0; i + 1 < n; i++) {
        uint32_t rank = find_pair(t, (uint32_t)id[i], (uint32_t)id[i + 1])->rank;
        if (rank != UINT32_MAX) heap[n_heap++] = (uint64_t)rank << 32 | (uint32_t)i;
    }
    for (size_t i = (n_heap + 2) / 4; i-- > 0;) heap_sink(heap, n_heap, i);
    while (n_heap > 0) {
        uint64_t top = heap[0];
        heap[0] = heap[--n_heap];
        if (n_heap) heap_sink(heap, n_heap, 0);
        int32_t i = (int32_t)(top & UINT32_MAX), j = next[i];
        if (id[i] < 0 || j >= n) continue;
        const MergePair *pair = find_pair(t, (uint32_t)id[i], (uint32_t)id[j]);
        if (pair->rank != top >> 32) continue;
        id[i] = (int32_t)pair->result;
        id[j] = -1;
        next[i] = next[j];
        if (next[i] < n) {
            prev[next[i]] = i;
            pair = find_pair(t, (uint32_t)id[i], (uint32_t)id[next[i]]);
            if (pair->rank != UINT32_MAX)
                heap_push(heap, &n_heap, (uint64_t)pair->rank << 32 | (uint32_t)i);
        }
        if (prev[i] >= 0) {
            pair = find_pair(t, (uint32_t)id[prev[i]], (uint32_t)id[i]);
            if (pair->rank != UINT32_MAX)
                heap_push(heap, &n_heap, (uint64_t)pair->rank << 32 | (uint32_t)prev[i]);
        }
    }
    for (int32_t i = 0; i < n; i = next[i])
        if (push_ids(e, &id[i], 1) < 0) return -1;
    return 0;
}

// Appends the ids of one word.
static int encode_word(Encoder *e, const unsigned char *word, size_t bytes) {
    const Tokenizer *t = e->t;
    CacheSlot *slot = NULL;
    if (e->cache && bytes > 1 && bytes <= CACHE_BYTES) {
        slot = &e->cache[hash_bytes(word, bytes) % CACHE_SLOTS];
        if (slot->n_bytes == bytes && memcmp(slot->bytes, word, bytes) == 0)
            return push_ids(e, slot->ids, slot->n_ids);
    }
    int32_t id[SHORT_WORD];
    size_t n = 0;
    if (t->kind == TOKENIZER_WORDS || t->flags & IGNORE_MERGES) {
        id[0] = find_token(t, word, bytes);
        n = id[0] >= 0;
    }
    if (n == 0 && t->kind == TOKENIZER_WORDS) {
        id[n++] = t->unknown;
        if (t->unknown < 0)
            return fail("the tokenizer has no token for '%.*s' and none for unknown words",
                        (int)(bytes < 40 ? bytes : 40), (const char *)word);
    }
    if (n == 0 && bytes > SHORT_WORD) return merge_long(e, word, bytes);
    if (n == 0) n = merge_short(t, id, word_symbols(t, word, bytes, id));
    if (slot && n <= CACHE_IDS) {
        slot->n_bytes = (unsigned char)bytes;
        slot->n_ids = (unsigned char)n;
        memcpy(slot->bytes, word, bytes);
        memcpy(slot->ids, id, n * sizeof *id);
    }
    return push_ids(e, id, n);
}

// -------------------------------------------------------------------------------------------------
// 4. Words. The regular expressions that cut a text, written as code. That of GPT-2 has these
// alternatives, in this order:
//   's|'t|'re|'ve|'m|'ll|'d | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+
// That of GPT-4 and Llama 3:
//   (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n\p{L}\p{N}]?\p{L}+ | \p{N}{1,3}
//   | ?[^\s\p{L}\p{N}]+[\r\n]* | \s*[\r\n]+ | \s+(?!\S) | \s+
// Qwen2 has \p{N} in place of \p{N}{1,3}. Falcon cuts at runs of punctuation before the expression
// of GPT-2, and at runs of digits after it. Each function below returns the end of the piece that
// starts at p.

enum { KIND = LETTER | NUMBER | SPACE };

// The length of 's, 't, 're ... at p, which is an apostrophe; 0: there is none. any_case: capitals
// too, and the long s, which Unicode counts as a form of s.
static size_t contraction(const unsigned char *p, const unsigned char *end, bool any_case) {
    const size_t n = (size_t)(end - p);
    const unsigned char lower = any_case ? 32 : 0;
    const unsigned char a = n > 1 ? p[1] | lower : 0, b = n > 2 ? p[2] | lower : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((b == 'e' && (a == 'r' || a == 'v')) || (a == 'l' && b == 'l')) return 3;
    return any_case && n > 2 && p[1] == 0xC5 && p[2] == 0xBF ? 3 : 0;
}

// The end of the characters of this kind from q on.
static const unsigned char *run_end(const Tokenizer *t, const unsigned char *q,
                                    const unsigned char *end, unsigned kind) {
    while (q < end) {
        const unsigned char *here = q;
        if ((next_class(t, &q) & KIND) != kind) return here;
    }
    return end;
}

// White space at p: a run leaves its last character to the next word. newlines: a run with line
// ends stops after the last of them.
static const unsigned char *space_end(const Tokenizer *t, const unsigned char *p,
                                      const unsigned char *end, bool newlines) {
    const unsigned char *last = p, *q = p, *line = NULL;
    while (q < end) {
        const unsigned char *here = q;
        if (!(next_class(t, &q) & SPACE)) return line ? line : last > p ? last : here;
        if (newlines && (*here == '\n' || *here == '\r')) line = q;
        last = here;
    }
    return line ? line : end;
}

static const unsigned char *gpt2_end(const Tokenizer *t, const unsigned char *p,
                                     const unsigned char *end) {
    const unsigned char *q = p;
    size_t n = *p == '\'' ? contraction(p, end, false) : 0;
    if (n > 0) return p + n;
    if (*p == ' ' && p + 1 < end) q = p + 1;
    unsigned kind = next_class(t, &q) & KIND;
    return kind == SPACE ? space_end(t, p, end, false) : run_end(t, q, end, kind);
}

// most: how many digits a word has at most.
static const unsigned char *gpt4_end(const Tokenizer *t, const unsigned char *p,
                                     const unsigned char *end, int most) {
    const unsigned char *q = p, *after;
    size_t n = *p == '\'' ? contraction(p, end, true) : 0;
    if (n > 0) return p + n;
    unsigned kind = next_class(t, &q) & KIND, next = 0;
    if (kind == LETTER) return run_end(t, q, end, LETTER);
    if (kind == NUMBER) {
        for (after = q; --most > 0 && q < end && next_class(t, &after) & NUMBER;) q = after;
        return q;
    }
    after = q;
    if (q < end) next = next_class(t, &after) & KIND;
    if (next == LETTER && *p != '\r' && *p != '\n') return run_end(t, after, end, LETTER);
    if (kind == SPACE && (*p != ' ' || q == end || next)) return space_end(t, p, end, true);
    q = run_end(t, q, end, 0);
    while (q < end && (*q == '\r' || *q == '\n')) q++;
    return q;
}

// Digits, for the library's step of that name. Its version of Unicode has some more than \p{N}.
static bool is_numeric(const Tokenizer *t, const unsigned char **p) {
    if (**p < 0x80) return next_class(t, p) & NUMBER;
    uint32_t c = utf8_next(p);
    return class_of(t, c) & NUMBER || (c >= 0x11DE0 && c <= 0x11DE9) ||
           (c >= 0x16FF4 && c <= 0x16FF6);
}

// each: every digit is a piece.
static const unsigned char *digits_end(const Tokenizer *t, const unsigned char *p,
                                       const unsigned char *end, bool each) {
    const bool numeric = is_numeric(t, &p);
    if (numeric && each) return p;
    while (p < end) {
        const unsigned char *here = p;
        if (is_numeric(t, &p) != numeric) return here;
    }
    return end;
}

static const unsigned char *punct_end(const Tokenizer *t, const unsigned char *p,
                                      const unsigned char *end) {
    const unsigned punct = next_class(t, &p) & PUNCT;
    while (p < end) {
        const unsigned char *here = p;
        if ((next_class(t, &p) & PUNCT) != punct) return here;
    }
    return end;
}

// Falcon's steps after ByteLevel see characters of the byte alphabet. Six bytes of longer
// characters look like superscripts and fractions there, so they count as numeric too.
static bool is_numeric_byte(unsigned char b) {
    return (b >= '0' && b <= '9') || b == 0xB2 || b == 0xB3 || b == 0xB9 || b == 0xBC ||
           b == 0xBD || b == 0xBE;
}

static bool is_digit(unsigned char b) { return b >= '0' && b <= '9'; }

// Falcon's steps Digits and Split: a run of numeric bytes is a word of its own, and so are each
// three digits in it, counted from the left.
static const unsigned char *falcon_end(const unsigned char *p, const unsigned char *end) {
    const bool numeric = is_numeric_byte(*p);
    for (const unsigned char *q = p; q < end; q++) {
        if (is_numeric_byte(*q) != numeric) return q;
        if (numeric && end - q >= 3 && is_digit(q[0]) && is_digit(q[1]) && is_digit(q[2]))
            return q > p ? q : q + 3;
    }
    return end;
}

// \w+|[^\w\s]+, or with `blanks` \S+. Pieces of white space are dropped.
static const unsigned char *words_end(const Tokenizer *t, const unsigned char *p,
                                      const unsigned char *end, bool blanks, bool *drop) {
    const unsigned of = blanks ? SPACE : SPACE | IN_WORD, kind = next_class(t, &p) & of;
    *drop = kind & SPACE;
    while (p < end) {
        const unsigned char *here = p;
        if ((next_class(t, &p) & of) != kind) return here;
    }
    return end;
}

// The next space after p's first byte.
static const unsigned char *spaces_end(const unsigned char *p, const unsigned char *end) {
    for (p++; p < end && *p != ' ';) p++;
    return p;
}

// The next place where no merge joins anything.
static const unsigned char *safe_end(const Tokenizer *t, const unsigned char *p,
                                     const unsigned char *end) {
    for (p++; p < end && t->joins[p[-1]][*p >> 3] >> (*p & 7) & 1;) p++;
    return p;
}

static const unsigned char *piece_end(const Tokenizer *t, int step, const unsigned char *p,
                                      const unsigned char *end, bool *drop) {
    switch (t->step[step]) {
    case STEP_GPT2:
        return gpt2_end(t, p, end);
    case STEP_GPT4:
        return gpt4_end(t, p, end, 3);
    case STEP_QWEN2:
        return gpt4_end(t, p, end, 1);
    case STEP_NUMBERS:
        return digits_end(t, p, end, false);
    case STEP_DIGITS:
        return digits_end(t, p, end, true);
    case STEP_PUNCT:
        return punct_end(t, p, end);
    case STEP_FALCON:
        return falcon_end(p, end);
    case STEP_WORDS:
        return words_end(t, p, end, false, drop);
    case STEP_BLANKS:
        return words_end(t, p, end, true, drop);
    case STEP_SPACES:
        return spaces_end(p, end);
    case STEP_SAFE:
        return safe_end(t, p, end);
    default:
        return utf8_next(&p), p; // STEP_CHARS
    }
}

// Cuts a piece by the steps from `step` on, and encodes the words.
static int encode_steps(Encoder *e, int step, const unsigned char *s, const unsigned char *end) {
    const int n_steps = e->t->n_steps;
    if (step == n_steps) return encode_word(e, s, (size_t)(end - s));
    while (s < end) {
        bool drop = false;
        const unsigned char *next = piece_end(e->t, step, s, end, &drop);
        int status = drop                  ? 0
                     : step + 1 == n_steps ? encode_word(e, s, (size_t)(next - s))
                                           : encode_steps(e, step + 1, s, next);
        if (status < 0) return -1;
        s = next;
    }
    return 0;
}

// Encodes normalized text (at least a byte) without added tokens.
static int encode_plain(Encoder *e, const unsigned char *s, size_t n) {
    const uint32_t flags = e->t->flags;
    const unsigned char *user = NULL;
    const bool spaces = flags & WORD_SPACES;
    const bool wanted = flags & TOKENIZER_PREFIX_SPACE && (e->at_start || !(flags & FIRST_PREFIX));
    const bool prefix = wanted && s[0] != ' ' && !(spaces && is_2581(s, s + n));
    if (respace(e, &e->prefixed, prefix, spaces, &s, &user, &n) < 0) return -1;
    return encode_steps(e, 0, s, s + n);
}

// -------------------------------------------------------------------------------------------------
// 5. Added tokens. The leftmost match is taken; of several at one place, the longest. Tokens with
// the flag `normalized` are found in the text after NFC, the others in the raw text. lstrip and
// rstrip extend a match over white space. As in the library, rstrip does not move the start of the
// next search, so a token of spaces is found again inside the spaces that an rstrip took.

//
// In a chat, what a user wrote stands between the texts of a template, and must not become a
// special token. `user` marks the user's bytes of a text with 1, those of the template with 0;
// NULL: there are none of the user. A special token all of the user's is skipped, as the library
// does when it is told to encode special tokens. One across a border is not seen at all; the space
// that the normalizer puts before a token does not count.

// Whether the added token is found with a space before it.
static bool is_prefixed(const Tokenizer *t, uint32_t added) {
    return t->flags & NORMAL_PREFIX && t->added[added].flags & ADDED_NORMALIZED;
}

static bool may_match(const Encoder *e, uint32_t added, const unsigned char *user, size_t from,
                      size_t stop) {
    if (user == NULL || !(e->t->added[added].flags & ADDED_SPECIAL)) return true;
    from += is_prefixed(e->t, added);
    return memchr(user + from, !user[from], stop - from) == NULL;
}

// Finds the first match from *start on: the token and where it starts and stops.
static bool trie_find(const Encoder *e, const Trie *trie, const unsigned char *s,
                      const unsigned char *user, size_t n, size_t *start, size_t *stop,
                      uint32_t *added) {
    bool found = false;
    for (size_t from = *start; from < n && !found; from++) {
        if (!trie->starts[s[from]]) continue;
        uint32_t at = 0;
        for (size_t i = from; i < n; i++) {
            uint32_t child = trie->node[at].child;
            while (child && trie->node[child].byte != s[i]) child = trie->node[child].sibling;
            if (child == 0) break;
            at = child;
            if (trie->node[at].added == UINT32_MAX ||
                !may_match(e, trie->node[at].added, user, from, i + 1))
                continue;
            found = true;
            *start = from;
            *stop = i + 1;
            *added = trie->node[at].added;
        }
    }
    return found;
}

static int encode_section(Encoder *e, const unsigned char *s, const unsigned char *user, size_t n,
                          bool normalized);

// The text between two added tokens goes to the next step.
static int encode_between(Encoder *e, const unsigned char *s, const unsigned char *user, size_t n,
                          bool normalized) {
    const uint32_t flags = e->t->flags;
    if (normalized) return encode_plain(e, s, n);
    if (flags & TOKENIZER_NFC && nfc(e, &s, &user, &n) < 0) return -1;
    if (respace(e, &e->spaced, flags & NORMAL_PREFIX, flags & NORMAL_SPACES, &s, &user, &n) < 0)
        return -1;
    return encode_section(e, s, user, n, true);
}

// blank: whether a space counts as white space. Where the normalizer made it a U+2581, it does not.
static bool space_at(const Tokenizer *t, const unsigned char *p, bool blank) {
    return (blank || *p != ' ') && next_class(t, &p) & SPACE;
}
static bool word_at(const Tokenizer *t, const unsigned char *p) {
    return next_class(t, &p) & IN_WORD;
}

// Cuts a text at its added tokens: raw text, or with `normalized` text after the normalizer.
static int encode_section(Encoder *e, const unsigned char *s, const unsigned char *user, size_t n,
                          bool normalized) {
    const Tokenizer *t = e->t;
    const bool starts = e->at_start, blank = !normalized || !(t->flags & NORMAL_SPACES);
    const Trie *trie = normalized ? &t->normalized : &t->raw;
    size_t done = 0, search = 0, start = 0, stop = 0, space_end = 0;
    uint32_t added;
    while (trie->n > 0) {
        start = search;
        if (!trie_find(e, trie, s, user, n, &start, &stop, &added)) break;
        uint32_t flags = t->added[added].flags;
        int32_t id = (int32_t)t->added[added].id;
        search = stop;
        if (user && flags & ADDED_SPECIAL && user[start + is_prefixed(t, added)]) continue;
        if (flags & ADDED_SINGLE_WORD &&
            ((start > 0 && word_at(t, utf8_back(s + start))) || (stop < n && word_at(t, s + stop))))
            continue;
        if (flags & ADDED_LSTRIP) {
            while (start > done && space_at(t, utf8_back(s + start), blank))
                start = (size_t)(utf8_back(s + start) - s);
            if (start < done) start = done;
        }
        if (flags & ADDED_RSTRIP) {
            if (stop < space_end) stop = space_end; // this white space was skipped before
            for (const unsigned char *p = s + stop; stop < n && space_at(t, p, blank);
                 stop = (size_t)(p - s))
                utf8_next(&p);
            space_end = stop;
        }
        e->at_start = starts && done == 0;
        if (done < start &&
            encode_between(e, s + done, user ? user + done : NULL, start - done, normalized) < 0)
            return -1;
        if (push_ids(e, &id, 1) < 0) return -1;
        done = stop;
    }
    e->at_start = starts && done == 0;
    if (done == n) return 0;
    return encode_between(e, s + done, user ? user + done : NULL, n - done, normalized);
}

// -------------------------------------------------------------------------------------------------
// 6. Encode.

// s: the text; user: its marks, or NULL. The caller frees *ids. 0, or -1 after fail(); for a text
// that is not UTF-8 the message names the offset.
static int encode_marked(const Tokenizer *t, const unsigned char *s, const unsigned char *user,
                         size_t bytes, int32_t **ids, size_t *n_ids) {
    size_t good = t->kind == TOKENIZER_BYTES ? bytes : utf8_check(s, bytes);
    Encoder e = {.t = t, .at_start = true};
    *ids = NULL;
    *n_ids = 0;
    // This limit keeps every size below from overflowing.
    if (bytes > SIZE_MAX / 64) return fail("a text of %zu bytes is too long", bytes);
    if (good != bytes)
        return fail("the text is not UTF-8 at byte %zu (a bytes tokenizer takes anything)", good);
    e.capacity = (t->kind == TOKENIZER_BYTES ? bytes : bytes / 4) + 16;
    e.ids = memory_get(e.capacity * sizeof *e.ids);
    if (e.ids == NULL) return fail("tokenizer: out of memory (%zu ids)", e.capacity);
    int status = 0;
    if (t->kind == TOKENIZER_BYTES) {
        for (size_t i = 0; i < bytes && status == 0; i++) {
            if (s[i] >= t->n_ids)
                status = fail("byte %zu is %u, and this model knows only bytes below %u", i, s[i],
                              t->n_ids);
            e.ids[i] = s[i];
        }
        e.n_ids = bytes;
    } else if (bytes > 0) {
        if (bytes >= CACHE_FROM) // without memory for it, encoding is only slower
            e.cache = memory_zeroed(CACHE_SLOTS, sizeof *e.cache);
        status = encode_section(&e, s, user, bytes, false);
    }
    encoder_free(&e);
    if (status < 0) {
        memory_free(e.ids);
        return -1;
    }
    *ids = e.ids;
    *n_ids = e.n_ids;
    return 0;
}

typedef struct {
    const char *text;
    size_t bytes;
    bool special; // the text may contain special tokens: a template, not what a user wrote
} TextPiece;

// The ids of all pieces as of one text. The caller frees *ids. 0, or -1 after fail().
static int tokenizer_encode(const Tokenizer *t, const TextPiece *piece, size_t n_pieces,
                            int32_t **ids, size_t *n_ids) {
    if (n_pieces == 1 && piece->special)
        return encode_marked(t, (const unsigned char *)piece->text, NULL, piece->bytes, ids, n_ids);
    size_t bytes = 0, at = 0;
    *ids = NULL;
    *n_ids = 0;
    for (size_t i = 0; i < n_pieces; i++) {
        if (piece[i].bytes > SIZE_MAX / 64 - bytes) return fail("a text is too long");
        bytes += piece[i].bytes;
    }
    unsigned char *text = memory_get(2 * bytes + 1); // and its marks
    if (text == NULL) return fail("tokenizer: out of memory (%zu bytes)", bytes);
    for (size_t i = 0; i < n_pieces; at += piece[i++].bytes) {
        if (piece[i].bytes) memcpy(text + at, piece[i].text, piece[i].bytes);
        memset(text + bytes + at, !piece[i].special, piece[i].bytes);
    }
    int status = encode_marked(t, text, text + bytes, bytes, ids, n_ids);
    memory_free(text);
    return status;
}

// The id that goes before a prompt, or -1.
static int32_t tokenizer_bos(const Tokenizer *t) { return t->bos; }

// The id of what has no token, or -1.
UNUSED static int32_t tokenizer_unknown(const Tokenizer *t) { return t->unknown; }

// -------------------------------------------------------------------------------------------------
// 7. Streaming decode. Ids stand for bytes, and a character may take several ids. Only whole
// characters are written; the bytes of an unfinished one are kept. Bytes that cannot become a
// character give U+FFFD, one for each longest prefix of a possible character. This is what
// String::from_utf8_lossy of Rust does to the whole text.
//
// The tokens of kind 2 and 3 are whole characters, but for those of one byte. Of these, the library
// turns every byte of a run into U+FFFD if the run is not UTF-8 as a whole. A stream cannot wait
// for the end of a run: characters that are whole by then stay here, and each other byte gives
// U+FFFD.

typedef struct {
    unsigned char bytes[4];
    int n;
    bool at_start; // nothing was written: spaces that the decoder drops at the start are dropped
} Utf8Pending;

static size_t utf8_replace(unsigned char *out) {
    memcpy(out, "\xEF\xBF\xBD", 3);
    return 3;
}

// Writes at most 3 * (n + 4) bytes to out; returns how many.
static size_t utf8_push(Utf8Pending *p, const unsigned char *in, size_t n, unsigned char *out) {
    size_t n_out = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char low, high;
        if (p->n > 0) { // an unfinished character: does this byte continue it?
            int length = utf8_start(p->bytes[0], &low, &high);
            bool fits = p->n == 1 ? in[i] >= low && in[i] <= high : (in[i] & 0xC0) == 0x80;
            if (fits) {
                p->bytes[p->n++] = in[i];
                if (p->n < length) continue;
                memcpy(out + n_out, p->bytes, (size_t)length);
                n_out += (size_t)length;
                p->n = 0;
                continue;
            }
            n_out += utf8_replace(out + n_out);
            p->n = 0;
        }
        int length = utf8_start(in[i], &low, &high);
        if (length == 1) out[n_out++] = in[i];
        else if (length == 0) n_out += utf8_replace(out + n_out);
        else p->bytes[p->n++] = in[i];
    }
    return n_out;
}

// At the end of the text: an unfinished character becomes U+FFFD. Writes at most 3 bytes, of kind 2
// at most 9.
static size_t utf8_flush(const Tokenizer *t, Utf8Pending *p, unsigned char *out) {
    size_t n = 0;
    const bool each = t && t->kind == TOKENIZER_CHARS;
    for (int i = 0; i < (each ? p->n : p->n > 0); i++) n += utf8_replace(out + n);
    p->n = 0;
    return n;
}

// The token of one byte, <0xNN>.
static size_t push_byte(const Tokenizer *t, Utf8Pending *p, unsigned char b, unsigned char *out) {
    unsigned char low, high;
    size_t n_out = 0;
    if (p->n > 0) {
        utf8_start(p->bytes[0], &low, &high);
        bool fits = p->n == 1 ? b >= low && b <= high : (b & 0xC0) == 0x80;
        if (!fits) n_out = utf8_flush(t, p, out);
    }
    return n_out + utf8_push(p, &b, 1, out + n_out);
}

// What token id adds to a text; returns how many bytes were written, at most 3 * (n + 4) for a
// token of n bytes. A bytes tokenizer's bytes pass as they are.
static size_t tokenizer_decode(const Tokenizer *t, Utf8Pending *p, int id, unsigned char *out) {
    size_t bytes, n_out = 0;
    const unsigned char *token = tokenizer_token(t, id, &bytes);
    const bool starts = p->at_start;
    uint32_t marks = 0;
    if (token == NULL) return 0;
    p->at_start = false;
    if (t->kind == TOKENIZER_BYTES) {
        out[0] = *token;
        return 1;
    }
    token_bytes(t, (uint32_t)id, &bytes, &marks);
    if (t->flags & DECODE_JOIN && !starts) {
        n_out = utf8_flush(t, p, out);
        out[n_out++] = ' ';
    }
    if (starts && t->flags & DECODE_STRIP && *token == ' ') {
        token++;
        bytes--;
    }
    if (t->kind == TOKENIZER_BPE) return n_out + utf8_push(p, token, bytes, out + n_out);
    if (marks & TOKENIZER_ONE_BYTE && bytes) return n_out + push_byte(t, p, *token, out + n_out);
    n_out += utf8_flush(t, p, out + n_out);
    const bool all = starts && t->flags & DECODE_STRIP_TOKEN && !marks;
    for (size_t i = 0; i < bytes; i++)
        if (!all || token[i] != ' ') out[n_out++] = token[i];
    return n_out;
}
