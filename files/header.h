// --- the header of a file
// One table of fields describes each header. Reading, checking and writing all use the table. Every
// header begins with 8 bytes that name the format, the format's version and the header's length. It
// ends with the checksum of all bytes before. Numbers are little-endian. Other bytes are zero.

typedef enum { FIELD_U32, FIELD_I32, FIELD_ID, FIELD_U64, FIELD_F32, FIELD_F64, FIELD_TEXT } Kind;
static const int KIND_BYTES[] = {4, 4, 4, 8, 4, 8, 1};

typedef struct {
    const char *name;       // as an error names it
    int offset;             // in the header
    Kind kind;              // FIELD_ID: a token id
    int count;              // numbers one after the other; for FIELD_TEXT bytes
    double lowest, highest; // of a number. A float must be below highest; FIELD_F64 may be
                            // anything. A token id is below the vocabulary's size.
    size_t place;           // offsetof() in the struct that holds what the header says
} Field;

typedef struct {
    char magic[8];
    int version, bytes;
    const char *what; // this file is, as an error names it
    const Field *field;
    int n;
} HeaderFormat;

// Any value of the kind.
#define ANY_U32 0, 4294967295.0
#define ANY_U64 0, 0x1p64
#define ANY_F64 0, 0
#define ANY_TEXT 0, 0
#define NUMBER_OF(fields) ((int)(sizeof(fields) / sizeof *(fields)))

// Whether a file of so many bytes begins with this format's name.
static bool header_is(const unsigned char *h, size_t bytes, const HeaderFormat *format) {
    return bytes >= (size_t)format->bytes && !memcmp(h, format->magic, sizeof format->magic);
}
static bool header_version_fits(const unsigned char *h, const HeaderFormat *format) {
    return u32_at(h + 8) == (uint32_t)format->version && u32_at(h + 12) == (uint32_t)format->bytes;
}
static uint32_t header_crc(const unsigned char *h, const HeaderFormat *format) {
    return u32_at(h + format->bytes - 4); // as stored
}
static bool header_is_whole(const unsigned char *h, const HeaderFormat *format) {
    return crc32_of(0, h, (size_t)format->bytes - 4) == header_crc(h, format);
}

// The fields of h into the struct `to`.
static void header_read(void *to, const HeaderFormat *format, const unsigned char *h) {
    for (const Field *f = format->field; f < format->field + format->n; f++)
        for (int i = 0; i < f->count; i++) {
            const int bytes = KIND_BYTES[f->kind];
            const unsigned char *from = h + f->offset + i * bytes;
            const uint32_t word = bytes == 4 ? u32_at(from) : *from;
            const uint64_t wide = bytes == 8 ? u64_at(from) : 0;
            char *place = (char *)to + f->place + i * bytes;
            if (bytes == 8) memcpy(place, &wide, 8);
            else if (bytes == 4) memcpy(place, &word, 4);
            else *place = (char)word;
        }
}

// The whole header h (format->bytes) from the struct `from`.
static void header_write(unsigned char *h, const HeaderFormat *format, const void *from) {
    memset(h, 0, (size_t)format->bytes);
    memcpy(h, format->magic, sizeof format->magic);
    put_u32(h + 8, (uint32_t)format->version);
    put_u32(h + 12, (uint32_t)format->bytes);
    for (const Field *f = format->field; f < format->field + format->n; f++)
        for (int i = 0; i < f->count; i++) {
            const int bytes = KIND_BYTES[f->kind];
            const char *place = (const char *)from + f->place + i * bytes;
            unsigned char *to = h + f->offset + i * bytes;
            uint32_t word;
            uint64_t wide;
            if (bytes == 8) {
                memcpy(&wide, place, 8);
                put_u64(to, wide);
            } else if (bytes == 4) {
                memcpy(&word, place, 4);
                put_u32(to, word);
            } else *to = (unsigned char)*place;
        }
    put_u32(h + format->bytes - 4, crc32_of(0, h, (size_t)format->bytes - 4));
}

static double field_value(const Field *f, const char *place) {
    uint32_t word;
    int32_t number;
    float real;
    uint64_t wide;
    switch (f->kind) {
    case FIELD_U32:
        memcpy(&word, place, 4);
        return word;
    case FIELD_F32:
        memcpy(&real, place, 4);
        return (double)real;
    case FIELD_U64:
        memcpy(&wide, place, 8);
        return (double)wide;
    case FIELD_I32:
    case FIELD_ID:
        memcpy(&number, place, 4);
        return number;
    default:
        return 0; // has no range
    }
}

// Whether every field is in its range. V: the size of the vocabulary. 0, or -1 after fail().
static int header_check(const char *path, const HeaderFormat *format, const void *in, int V) {
    for (const Field *f = format->field; f < format->field + format->n; f++)
        for (int i = 0; i < f->count && f->kind != FIELD_F64 && f->kind != FIELD_TEXT; i++) {
            double x = field_value(f, (const char *)in + f->place + i * KIND_BYTES[f->kind]);
            if (f->kind == FIELD_ID && !(x >= f->lowest && x < V))
                return fail("%s: %s token id %.0f is not in the vocabulary of %d", path, f->name, x,
                            V);
            if (f->kind == FIELD_F32 && !(x >= f->lowest && x < f->highest))
                return fail("%s: header field %s is %g, not in [%g, %g): the file is damaged", path,
                            f->name, x, f->lowest, f->highest);
            if (f->kind < FIELD_F32 && f->kind != FIELD_ID && !(x >= f->lowest && x <= f->highest))
                return fail("%s: header field %s is %.0f, outside %.0f..%.0f: the file is damaged "
                            "or not %s",
                            path, f->name, x, f->lowest, f->highest, format->what);
        }
    return 0;
}
