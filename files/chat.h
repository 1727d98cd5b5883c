// files/chat.h - what a chat template puts around the texts of a conversation. export.py finds it
// out and stores it at the end of the tokenizer's blob (doc/FORMAT.md).
//
// A conversation is these pieces in a row, where S, U1, R1 are the texts of the system, the user
// and the model:
//   [open_system S system_user] or [open_user], U1 user_reply R1 reply_user U2 user_reply ...
// The model writes after each user_reply. reply_user begins with a special token, which ends the
// reply, and added tokens cut a text before anything else is done with it. So a conversation can be
// encoded turn by turn: the ids are those of the whole.

enum { OPEN_USER, OPEN_SYSTEM, SYSTEM_USER, USER_REPLY, REPLY_USER, TEMPLATE, CHAT_TEXTS };
enum { CHAT_TRIMS = 1 };

typedef struct {
    TextPiece text[CHAT_TEXTS]; // text NULL: the template has no such part
    bool trims;                 // white space around a user's text is left out
    int32_t end;                // the token that ends a reply
} Chat;

static bool chat_read(Chat *c, const unsigned char *at, size_t bytes) {
    if (bytes < 4) return false;
    const uint32_t flags = u32_at(at);
    c->trims = flags & CHAT_TRIMS;
    at += 4, bytes -= 4;
    for (int i = 0; i < CHAT_TEXTS; i++) {
        if (bytes < 4) return false;
        const uint32_t n = u32_at(at);
        at += 4, bytes -= 4;
        c->text[i] = (TextPiece){NULL, 0, true};
        if (n == UINT32_MAX) continue;
        if (n > bytes || utf8_check(at, n) != n) return false;
        c->text[i] = (TextPiece){(const char *)at, n, true};
        at += n, bytes -= n;
    }
    return flags <= CHAT_TRIMS && bytes == 0 && c->text[OPEN_USER].text &&
           c->text[USER_REPLY].text && c->text[REPLY_USER].text &&
           !c->text[OPEN_SYSTEM].text == !c->text[SYSTEM_USER].text;
}

// What the chat template of model m puts around texts. It points into m. 0, or -1 after fail()
// where m has none.
int mamba_chat(const Model *m, Chat *c) {
    const Tokenizer *t = m->tokenizer;
    int32_t *ids = NULL;
    size_t n = 0;
    if (!t || !t->chat) return fail("this model has no chat template: it goes on with a text");
    if (!chat_read(c, t->chat, t->chat_bytes)) return fail("the chat template is damaged");
    if (mamba_encode_pieces(m, &c->text[REPLY_USER], 1, &ids, &n)) return -1;
    c->end = n ? ids[0] : -1;
    memory_free(ids);
    return n ? 0 : fail("the chat template is damaged: nothing ends a reply");
}

static TextPiece chat_text(const Chat *c, TextPiece piece) {
    static const char blank[] = " \t\n\r\f\v";
    piece.special = false; // what a user writes is never a special token
    if (!c->trims) return piece;
    while (piece.bytes && memchr(blank, *piece.text, sizeof blank - 1)) piece.text++, piece.bytes--;
    while (piece.bytes && memchr(blank, piece.text[piece.bytes - 1], sizeof blank - 1))
        piece.bytes--;
    return piece;
}

// The ids of n texts, of the user and the model in turn, up to where the model writes on: n is odd.
// first: the conversation begins here, else the reply before ends here. system: NULL for none. The
// caller frees *ids. 0, or -1 after fail().
int mamba_chat_encode(const Model *m, const Chat *c, bool first, const char *system,
                      const TextPiece *texts, size_t n, int32_t **ids, size_t *n_ids) {
    if (n % 2 == 0) return fail("a conversation goes on after a text of the user");
    if (first && system && !c->text[OPEN_SYSTEM].text)
        return fail("the chat template of this model has no system text");
    TextPiece *piece = memory_zeroed(2 * n + 3, sizeof *piece);
    size_t k = 0;
    if (!piece) return fail("out of memory: %zu texts", n);
    if (!first) piece[k++] = c->text[REPLY_USER];
    else if (!system) piece[k++] = c->text[OPEN_USER];
    else {
        piece[k++] = c->text[OPEN_SYSTEM];
        piece[k++] = chat_text(c, (TextPiece){system, strlen(system), false});
        piece[k++] = c->text[SYSTEM_USER];
    }
    for (size_t i = 0; i < n; i++) {
        piece[k++] = chat_text(c, texts[i]);
        piece[k++] = c->text[i % 2 ? REPLY_USER : USER_REPLY];
    }
    int result = mamba_encode_pieces(m, piece, k, ids, n_ids);
    memory_free(piece);
    return result;
}

// The last token that a state has read; -1: none.
static int32_t last_token(const State *s) {
    return s->position ? s->recent[(s->position - 1) % RECENT] : -1;
}

// The token that ends a reply of model m. -1 after fail(): m has no chat template.
int32_t mamba_chat_end(const Model *m) {
    Chat c;
    return mamba_chat(m, &c) ? -1 : c.end;
}

// The ids of what a user says next, from the end of the reply before it to where the reply begins.
// s has read the conversation so far, maybe the token that ended the reply too. Where it has read
// nothing, the conversation opens, with the text system; NULL: without one. The caller frees *ids.
// 0, or -1 after fail().
int mamba_chat_turn(const Model *m, const State *s, const char *system, const char *text,
                    size_t bytes, int32_t **ids, size_t *n) {
    Chat c;
    const TextPiece said = {text, bytes, false};
    const bool opens = s->position == 0;
    if (mamba_chat(m, &c) || mamba_chat_encode(m, &c, opens, system, &said, 1, ids, n)) return -1;
    if (!opens && last_token(s) == c.end) memmove(*ids, *ids + 1, --*n * sizeof **ids);
    return 0;
}
