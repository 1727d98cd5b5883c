// files/system.h: what the operating system is asked for: which file a path means, putting one file
// in another's place, a file in memory, threads. POSIX and Windows; elsewhere C11 has to do.
// doc/PORTING.md lists the calls, and what a program is without them.
//
// Paths and arguments are UTF-8. So they are on Windows: its own calls take UTF-16, and fopen and
// remove are replaced by functions that translate.

#if defined(_WIN32)
// The text as UTF-16, malloc'd; NULL with errno set.
static wchar_t *wide_text(const char *text) {
    int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text, -1, NULL, 0);
    wchar_t *wide = n > 0 ? malloc((size_t)n * sizeof *wide) : NULL;
    if (wide) MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text, -1, wide, n);
    else errno = n > 0 ? ENOMEM : EINVAL;
    return wide;
}

static char *utf8_text(const wchar_t *wide) {
    int n = WideCharToMultiByte(CP_UTF8, 0, wide, -1, NULL, 0, NULL, NULL);
    char *text = n > 0 ? malloc((size_t)n) : NULL;
    if (text) WideCharToMultiByte(CP_UTF8, 0, wide, -1, text, n, NULL, NULL);
    return text;
}

// errno for the last error of Windows. Always -1.
static int windows_failed(void) {
    DWORD why = GetLastError();
    errno = why == ERROR_FILE_NOT_FOUND || why == ERROR_PATH_NOT_FOUND ? ENOENT
            : why == ERROR_FILE_EXISTS || why == ERROR_ALREADY_EXISTS  ? EEXIST
            : why == ERROR_DISK_FULL || why == ERROR_HANDLE_DISK_FULL  ? ENOSPC
            : why == ERROR_ACCESS_DENIED || why == ERROR_SHARING_VIOLATION ||
                    why == ERROR_USER_MAPPED_FILE
                ? EACCES
                : EIO;
    return -1;
}

UNUSED static FILE *open_utf8(const char *path, const char *mode) {
    wchar_t *name = wide_text(path), how[8] = {0};
    for (int i = 0; i < 7 && mode[i]; i++) how[i] = (wchar_t)mode[i];
    FILE *f = name ? _wfopen(name, how) : NULL;
    free(name);
    return f;
}

static int remove_utf8(const char *path) {
    wchar_t *name = wide_text(path);
    int bad = name ? _wremove(name) : -1;
    free(name);
    return bad;
}
#define fopen open_utf8
#define remove remove_utf8

// The arguments in UTF-8: those of main are in the code page of the console. Also makes the console
// a terminal of UTF-8 with colours.
UNUSED static char **program_arguments(int *argc, char **argv) {
    int n = 0;
    DWORD mode;
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), &n);
    char **all = wide && n == *argc ? calloc((size_t)n + 1, sizeof *all) : NULL;
    for (int i = 0; i < n && all; i++)
        if (!(all[i] = utf8_text(wide[i]))) all[i] = argv[i];
    if (wide) LocalFree(wide);
    SetConsoleOutputCP(CP_UTF8);
    SetConsoleCP(CP_UTF8);
    for (int i = 0; i < 2; i++) {
        HANDLE console = GetStdHandle(i ? STD_ERROR_HANDLE : STD_OUTPUT_HANDLE);
        if (GetConsoleMode(console, &mode))
            SetConsoleMode(console, mode | 4); // ENABLE_VIRTUAL_TERMINAL_PROCESSING
    }
    return all ? all : argv;
}
#else
UNUSED static char **program_arguments(int *argc, char **argv) {
    (void)argc;
    return argv;
}
#endif

// --- which file

typedef struct { // of a file that exists; device and inode tell it from every other
    bool regular, folder;
    uint64_t device, inode;
} FileInfo;

#if defined(MAMBA_POSIX)
#define CAN_TELL_FILES 1
static bool set_file_info(FileInfo *to, const struct stat *info) {
    *to = (FileInfo){S_ISREG(info->st_mode) != 0, S_ISDIR(info->st_mode) != 0,
                     (uint64_t)info->st_dev, (uint64_t)info->st_ino};
    return true;
}
// Whether path leads to something, else errno says why; *to says what.
static bool file_info(const char *path, FileInfo *to) {
    struct stat info;
    return stat(path, &info) == 0 && set_file_info(to, &info);
}
// The same of an open file: 0 is stdin, 1 stdout, 2 stderr.
static bool stream_info(int fd, FileInfo *to) {
    struct stat info;
    return fstat(fd, &info) == 0 && set_file_info(to, &info);
}

#elif defined(_WIN32)
#define CAN_TELL_FILES 1
static bool handle_info(HANDLE file, FileInfo *to) {
    BY_HANDLE_FILE_INFORMATION info;
    *to = (FileInfo){0};
    if (file == INVALID_HANDLE_VALUE || !file) return false;
    if (GetFileType(file) != FILE_TYPE_DISK) return true; // a console, a pipe, NUL
    if (!GetFileInformationByHandle(file, &info)) return false;
    to->folder = (info.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) != 0;
    to->regular = !to->folder;
    to->device = info.dwVolumeSerialNumber;
    to->inode = (uint64_t)info.nFileIndexHigh << 32 | info.nFileIndexLow;
    return true;
}
static bool file_info(const char *path, FileInfo *to) {
    const DWORD share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    wchar_t *name = wide_text(path);
    if (!name) return false;
    HANDLE file = CreateFileW(name, 0, share, NULL, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS, 0);
    bool known = handle_info(file, to);
    if (file == INVALID_HANDLE_VALUE) windows_failed();
    else CloseHandle(file);
    free(name);
    return known;
}
static bool stream_info(int fd, FileInfo *to) {
    DWORD which = fd == 0 ? STD_INPUT_HANDLE : fd == 1 ? STD_OUTPUT_HANDLE : STD_ERROR_HANDLE;
    return handle_info(GetStdHandle(which), to);
}

#else
#define CAN_TELL_FILES 0 // only equal names are known to be the same file
static bool file_info(const char *path, FileInfo *to) {
    (void)path;
    *to = (FileInfo){0};
    errno = ENOENT;
    return false;
}
static bool stream_info(int fd, FileInfo *to) {
    (void)fd;
    *to = (FileInfo){0};
    return false;
}
#endif

// Where the name of the file begins in path, after its folder. Only cli/ asks.
UNUSED static char *file_name_in(char *path) {
    char *name = path;
    for (char *p = path; *p; p++) {
#ifdef _WIN32
        if (*p == '\\' || *p == ':') name = p + 1;
#endif
        if (*p == '/') name = p + 1;
    }
    return name;
}

// --- files that are written

// Puts a finished file in another's place at once: 0, or -1 with errno set.
static int replace_file(const char *from, const char *to) {
#ifdef _WIN32
    wchar_t *old = wide_text(from), *new = wide_text(to);
    bool good =
        old && new && MoveFileExW(old, new, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
    if (old && new && !good) windows_failed();
    free(old);
    free(new);
    return good ? 0 : -1;
#else
    return rename(from, to);
#endif
}

// Everything written to f, which was flushed, is on the disk: 0, or -1 with errno set.
static int sync_file(FILE *f) {
#if defined(MAMBA_POSIX)
    return fsync(fileno(f));
#elif defined(_WIN32)
    return _commit(_fileno(f));
#else
    (void)f;
    return 0;
#endif
}

// A file that did not exist, open for writing: NULL with errno set, EEXIST if there was one.
static FILE *create_file(const char *name, unsigned mode) {
#if defined(MAMBA_POSIX)
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, (mode_t)mode);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "wb");
    if (fd >= 0 && !f) {
        close(fd);
        unlink(name);
    }
    return f;
#elif defined(_WIN32)
    (void)mode;
    wchar_t *wide = wide_text(name);
    int fd = -1;
    if (wide)
        fd = _wopen(wide, _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY | _O_NOINHERIT,
                    _S_IREAD | _S_IWRITE);
    FILE *f = fd < 0 ? NULL : _fdopen(fd, "wb");
    if (fd >= 0 && !f) {
        _close(fd);
        _wremove(wide);
    }
    free(wide);
    return f;
#else
    (void)mode;
    return fopen(name, "wbx");
#endif
}

// --- a file in memory

// The length of f, which is at its start again; -1 where it has none.
static int64_t stream_length(FILE *f) {
#if defined(MAMBA_POSIX)
    int64_t length = fseeko(f, 0, SEEK_END) ? -1 : (int64_t)ftello(f);
#elif defined(_WIN32)
    int64_t length = _fseeki64(f, 0, SEEK_END) ? -1 : (int64_t)_ftelli64(f);
#else
    int64_t length = fseek(f, 0, SEEK_END) ? -1 : (int64_t)ftell(f);
#endif
    rewind(f);
    return length;
}

// A regular file mapped for reading. NULL where that is impossible; then it can still be read.
static void *map_file(const char *path, size_t *bytes) {
    void *p = NULL;
#if defined(MAMBA_POSIX)
    int fd = open(path, O_RDONLY | O_NONBLOCK); // a FIFO without a writer would wait here
    struct stat info;
    if (fd < 0) return NULL;
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > 0 &&
        (uintmax_t)info.st_size <= SIZE_MAX / 2) {
        *bytes = (size_t)info.st_size;
        p = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) p = NULL;
    }
    close(fd);
#elif defined(_WIN32)
    wchar_t *name = wide_text(path);
    LARGE_INTEGER length;
    if (!name) return NULL;
    HANDLE file = CreateFileW(name, GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, NULL,
                              OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    free(name);
    if (file == INVALID_HANDLE_VALUE) return NULL;
    if (GetFileSizeEx(file, &length) && length.QuadPart > 0 &&
        (uint64_t)length.QuadPart <= SIZE_MAX / 2) {
        HANDLE mapping = CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL);
        *bytes = (size_t)length.QuadPart;
        if (mapping) p = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
        if (mapping) CloseHandle(mapping);
    }
    CloseHandle(file);
#else
    (void)path;
    (void)bytes;
#endif
    return p;
}

static void unmap_file(void *data, size_t bytes) {
#if defined(MAMBA_POSIX)
    munmap(data, bytes);
#elif defined(_WIN32)
    (void)bytes;
    UnmapViewOfFile(data);
#else
    (void)data;
    (void)bytes;
#endif
}

// --- threads

// How many of `wanted` threads can run: OpenMP ends the program where the system refuses one, as it
// does under `ulimit -v` or `ulimit -u`. Half of what could be started leaves room for the rest of
// the program.
#if defined(_OPENMP) && defined(MAMBA_POSIX)
static void *thread_waits(void *lock) {
    pthread_mutex_lock(lock);
    pthread_mutex_unlock(lock);
    return NULL;
}
static int possible_threads(int wanted) {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_t *thread = wanted > 1 ? malloc((size_t)wanted * sizeof *thread) : NULL;
    int n = 1;
    if (wanted < 2) return wanted;
    if (!thread) return 1;
    pthread_mutex_lock(&lock); // all at once: a thread that has ended takes no room
    while (n < wanted && pthread_create(&thread[n], NULL, thread_waits, &lock) == 0) n++;
    pthread_mutex_unlock(&lock);
    for (int i = 1; i < n; i++) pthread_join(thread[i], NULL);
    free(thread);
    if (n == wanted) return n;
    n = n > 1 ? n / 2 : 1;
    omp_set_num_threads(n);
    return n;
}
#else
static int possible_threads(int wanted) { return wanted; }
#endif

// The same for loops that do not say how many threads run them.
static void fit_default_team(void) {
#ifdef _OPENMP
    possible_threads(omp_get_max_threads());
#endif
}
