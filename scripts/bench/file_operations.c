/* Logs every change that a process makes below one folder, and makes chosen calls fail: an LD_PRELOAD library.
 *
 *   cc -shared -fPIC -O2 -o file_operations.so file_operations.c -ldl
 *
 * A program that was started with it sees these functions (ctypes.CDLL(None)):
 *
 *   file_operations_watch(root, log)   from now on, changes below `root` go to the file `log`; NULL: no log
 *   file_operations_mark(text)         a line of the program's own in the log
 *   file_operations_fail(n, how, last) the n-th call from now on that could fail in the way `how` does so:
 *                                      an errno; SHORT: a write takes half; n = 0: none. `last`: ONCE; FULL: so
 *                                      does every later call that takes space, and only these are counted;
 *                                      DEAD: every later call
 *   file_operations_failed()           what failed first, as text, and forgets it; "" when nothing did
 *   file_operations_count()            calls counted since file_operations_fail
 *
 * A record is a header line of tab-separated words and then, for `write`, that many raw bytes:
 *   mkdir PATH | create PATH INODE | write INODE OFFSET SIZE | size INODE SIZE | sync INODE PATH
 *   rename FROM TO | unlink PATH | rmdir PATH | mark TEXT
 * A file that is opened with O_TRUNC gives `size INODE 0`; preallocated space gives `size` too. Writes through
 * a memory map are not seen: the reader compares what it rebuilds with the folder (file_operations.py).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define SHORT (-1)
#define ONCE 0
#define FULL 1
#define DEAD 2
#define PATH_LIMIT 4096
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char root[PATH_LIMIT];
static int log_file = -1;
static long counted, fail_at;
static int fail_how, fail_lasts;
static char failed[PATH_LIMIT + 64];

void file_operations_watch(const char *folder, const char *log) {
    pthread_mutex_lock(&lock);
    snprintf(root, sizeof root, "%s", folder);
    if (log_file >= 0) syscall(SYS_close, log_file);
    log_file = log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644) : -1;
    pthread_mutex_unlock(&lock);
}

void file_operations_fail(long n, int how, int lasts) {
    pthread_mutex_lock(&lock);
    counted = 0, fail_at = n, fail_how = how, fail_lasts = lasts, failed[0] = 0;
    pthread_mutex_unlock(&lock);
}

long file_operations_count(void) { return counted; }

const char *file_operations_failed(void) {
    static char text[sizeof failed];
    pthread_mutex_lock(&lock);
    memcpy(text, failed, sizeof text);
    failed[0] = 0;
    pthread_mutex_unlock(&lock);
    return text;
}

static void put(const void *data, size_t size) {
    const char *next = data;
    while (size) {
        ssize_t done = syscall(SYS_write, log_file, next, size);
        if (done <= 0) abort();
        next += done, size -= (size_t)done;
    }
}

static void say(const char *form, ...) {
    char line[3 * PATH_LIMIT];
    va_list words;
    if (log_file < 0) return;
    va_start(words, form);
    int size = vsnprintf(line, sizeof line, form, words);
    va_end(words);
    put(line, (size_t)size);
}

void file_operations_mark(const char *text) {
    pthread_mutex_lock(&lock);
    say("mark\t%s\n", text);
    pthread_mutex_unlock(&lock);
}

/* The absolute path of `path` at `folder`, when it is the root or below it. */
static int below(int folder, const char *path, char *full) {
    if (!root[0] || !path) return 0;
    if (path[0] == '/') {
        snprintf(full, PATH_LIMIT, "%s", path);
    } else {
        char base[PATH_LIMIT] = "";
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
            if (size < 0) return 0;
            base[size] = 0;
        }
        if (snprintf(full, PATH_LIMIT, "%s/%s", base, path) >= PATH_LIMIT) return 0;
    }
    size_t length = strlen(root);
    return !strncmp(full, root, length) && (full[length] == '/' || !full[length]);
}

/* The path of an open file or folder below the root. */
static int opened(int descriptor, char *full) {
    char link[64];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, full, PATH_LIMIT - 1);
    if (size <= 0) return 0;
    full[size] = 0;
    size_t length = strlen(root);
    return !strncmp(full, root, length) && (full[length] == '/' || !full[length]);
}

static unsigned long inode(int descriptor) {
    struct stat status;
    return fstat(descriptor, &status) ? 0 : (unsigned long)status.st_ino;
}

/* Whether this call is the one to fail; `writing`: it could also be cut short. */
static int fails(const char *call, const char *path, int writing) {
    if (fail_how == SHORT && !writing) return 0;
    if (fail_lasts == FULL && !writing && !strstr("open fallocate mkdir", call)) return 0;
    counted++;
    if (!fail_at || (fail_lasts == ONCE ? counted != fail_at : counted < fail_at)) return 0;
    if (!failed[0]) snprintf(failed, sizeof failed, "%s %s", call, path + strlen(root));
    if (fail_how != SHORT) errno = fail_how;
    return 1;
}

static int open_changed(int folder, const char *path, int flags, mode_t mode) {
    char full[PATH_LIMIT];
    int changes = (flags & (O_ACCMODE | O_CREAT | O_TRUNC)) != 0;
    if (!changes || !below(folder, path, full))
        return (int)syscall(SYS_openat, folder, path, flags, mode);
    pthread_mutex_lock(&lock);
    struct stat before;
    int descriptor = -1, existed = !stat(full, &before);
    if (!fails("open", full, 0)) {
        descriptor = (int)syscall(SYS_openat, folder, path, flags, mode);
        int error = errno;
        if (descriptor >= 0 && !existed) say("create\t%s\t%lu\n", full, inode(descriptor));
        else if (descriptor >= 0 && flags & O_TRUNC) say("size\t%lu\t0\n", inode(descriptor));
        else if (descriptor < 0 && !existed && !stat(full, &before)) {
            /* O_DIRECT refused: Linux has made the file all the same. */
            say("create\t%s\t%lu\n", full, (unsigned long)before.st_ino);
        }
        errno = error;
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return descriptor;
}

#define MODE                                   \
    mode_t mode = 0;                           \
    if (flags & (O_CREAT | __O_TMPFILE)) {     \
        va_list words;                         \
        va_start(words, flags);                \
        mode = (mode_t)va_arg(words, int);     \
        va_end(words);                         \
    }

int open(const char *path, int flags, ...) { MODE return open_changed(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_changed(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return open_changed(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return open_changed(folder, path, flags, mode); }

FILE *fopen64(const char *path, const char *how) {
    char full[PATH_LIMIT];
    if (!below(AT_FDCWD, path, full) || (how[0] == 'r' && !strchr(how, '+')))
        return REAL(fopen64)(path, how);
    int flags = strchr(how, '+') ? O_RDWR : O_WRONLY;
    flags |= how[0] == 'r' ? 0 : O_CREAT | (how[0] == 'a' ? O_APPEND : O_TRUNC);
    int descriptor = open_changed(AT_FDCWD, path, flags | O_CLOEXEC, 0666);
    return descriptor < 0 ? NULL : fdopen(descriptor, how);
}
FILE *fopen(const char *path, const char *how) { return fopen64(path, how); }

static ssize_t write_changed(const char *call, int descriptor, const void *data, size_t size, off_t at, int placed) {
    char full[PATH_LIMIT];
    if (!opened(descriptor, full))
        return placed ? syscall(SYS_pwrite64, descriptor, data, size, at) : syscall(SYS_write, descriptor, data, size);
    pthread_mutex_lock(&lock);
    ssize_t done = -1;
    int stop = fails(call, full, 1), error = errno;
    if (!stop || fail_how == SHORT) {
        if (stop) size = size > 1 ? size / 2 : size;
        if (!placed) {
            struct stat status;
            int appends = fcntl(descriptor, F_GETFL) & O_APPEND && !fstat(descriptor, &status);
            at = appends ? status.st_size : lseek(descriptor, 0, SEEK_CUR);
        }
        done = placed ? syscall(SYS_pwrite64, descriptor, data, size, at) : syscall(SYS_write, descriptor, data, size);
        error = errno;
        if (done > 0) {
            say("write\t%lu\t%ld\t%ld\n", inode(descriptor), (long)at, (long)done);
            if (log_file >= 0) put(data, (size_t)done);
        }
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    return write_changed("write", descriptor, data, size, 0, 0);
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) {
    return write_changed("pwrite", descriptor, data, size, at, 1);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off_t at) {
    return write_changed("pwrite", descriptor, data, size, at, 1);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    ssize_t total = 0;
    for (int each = 0; each < count; each++) {
        ssize_t done = write_changed("writev", descriptor, parts[each].iov_base, parts[each].iov_len, 0, 0);
        if (done < 0) return total ? total : done;
        total += done;
        if ((size_t)done < parts[each].iov_len) break;
    }
    return total;
}

/* The calls that change a size, a name or nothing but durability: `text` is their record. */
#define CHANGE(call, is_below, full, action, ...)     \
    if (!(is_below)) return (int)(action);            \
    pthread_mutex_lock(&lock);                        \
    int result = -1, error;                           \
    if (!fails(call, full, 0)) {                      \
        result = (int)(action);                       \
        error = errno;                                \
        if (!result) say(__VA_ARGS__);                \
    } else error = errno;                             \
    pthread_mutex_unlock(&lock);                      \
    errno = error;                                    \
    return result;

int ftruncate64(int descriptor, off_t size) {
    char full[PATH_LIMIT];
    CHANGE("ftruncate", opened(descriptor, full), full, syscall(SYS_ftruncate, descriptor, size),
           "size\t%lu\t%ld\n", inode(descriptor), (long)size)
}
int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }

int posix_fallocate64(int descriptor, off_t at, off_t size) {
    char full[PATH_LIMIT];
    if (!opened(descriptor, full)) return REAL(posix_fallocate64)(descriptor, at, size);
    pthread_mutex_lock(&lock);
    struct stat status;
    int result = fails("fallocate", full, 0) ? errno : REAL(posix_fallocate64)(descriptor, at, size);
    if (!result && !fstat(descriptor, &status)) say("size\t%lu\t%ld\n", inode(descriptor), (long)status.st_size);
    pthread_mutex_unlock(&lock);
    return result;
}
int posix_fallocate(int descriptor, off_t at, off_t size) { return posix_fallocate64(descriptor, at, size); }

int fsync(int descriptor) {
    char full[PATH_LIMIT];
    CHANGE("fsync", opened(descriptor, full), full, syscall(SYS_fsync, descriptor),
           "sync\t%lu\t%s\n", inode(descriptor), full)
}
int fdatasync(int descriptor) {
    char full[PATH_LIMIT];
    CHANGE("fdatasync", opened(descriptor, full), full, syscall(SYS_fdatasync, descriptor),
           "sync\t%lu\t%s\n", inode(descriptor), full)
}

int mkdirat(int folder, const char *path, mode_t mode) {
    char full[PATH_LIMIT];
    CHANGE("mkdir", below(folder, path, full), full, syscall(SYS_mkdirat, folder, path, mode), "mkdir\t%s\n", full)
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int renameat(int from, const char *source, int to, const char *target) {
    char full[PATH_LIMIT], other[PATH_LIMIT];
    CHANGE("rename", below(from, source, full) && below(to, target, other), full,
           syscall(SYS_renameat2, from, source, to, target, 0), "rename\t%s\t%s\n", full, other)
}
int rename(const char *source, const char *target) { return renameat(AT_FDCWD, source, AT_FDCWD, target); }

int unlinkat(int folder, const char *path, int flags) {
    char full[PATH_LIMIT];
    CHANGE("unlink", below(folder, path, full), full, syscall(SYS_unlinkat, folder, path, flags),
           flags & AT_REMOVEDIR ? "rmdir\t%s\n" : "unlink\t%s\n", full)
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
