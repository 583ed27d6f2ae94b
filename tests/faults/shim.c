/* Counts the calls by which a process changes files below a folder, and kills it, or fails the call, at a chosen one.
 *
 * Preloaded (LD_PRELOAD), so that nothing escapes: Python's own calls, HDF5's, TensorFlow's. The harness forks, calls
 * fault_arm in the child, and lets the command run; or it starts a process with FAULT_FOLDER, FAULT_KIND, FAULT_CALL,
 * FAULT_ERRNO and FAULT_LOG in its environment. A write that is hit is done by half first, as a crash would.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WATCH, KILL, FAIL_ONCE, FAIL_FROM_HERE };

static char root[PATH_MAX];
static size_t root_length;
static int armed, mode, target, code, log_to = -1;
static int count;

void fault_arm(const char *folder, int what, int number, int error, int log) {
    snprintf(root, sizeof root, "%s/", folder);
    root_length = strlen(root);
    mode = what, target = number, code = error, log_to = log, count = 0, armed = 1;
}

void fault_disarm(void) { armed = 0; }

static int number_of(const char *variable) {
    const char *value = getenv(variable);
    return value ? atoi(value) : 0;
}

/* Processes that this one starts aren't watched, as they aren't when it was forked. */
__attribute__((constructor)) static void arm_by_environment(void) {
    const char *folder = getenv("FAULT_FOLDER");
    if (!folder) return;
    fault_arm(folder, number_of("FAULT_KIND"), number_of("FAULT_CALL"), number_of("FAULT_ERRNO"),
              number_of("FAULT_LOG"));
    unsetenv("FAULT_FOLDER");
}

/* Whether this call is to fail (1; errno is set), or to die half done (2). */
static int hit(const char *call, const char *path, int takes_space) {
    if (!armed || strncmp(path, root, root_length)) return 0;
    /* The session of ONNX Runtime's telemetry, which its import may write into the folder of temporary files. */
    if (!strcmp(path + root_length, "tmp/.ses")) return 0;
    int saved = errno, number = __sync_add_and_fetch(&count, 1);
    if (log_to >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path + root_length);
        syscall(SYS_write, log_to, line, (size_t)length);
    }
    errno = saved;
    if (mode == KILL && number == target) return 2;
    if ((mode == FAIL_ONCE && number == target) || (mode == FAIL_FROM_HERE && number >= target && takes_space)) {
        errno = code;
        return 1;
    }
    return 0;
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static const char *of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return path;
}

static const char *at(int folder, const char *name, char *path) {
    if (name[0] == '/') return name;
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        of_fd(folder, base);
    }
    snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
    return path;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define GUARD(call, path, space, failed) \
    do { \
        int fate = hit(call, path, space); \
        if (fate == 2) die(); \
        if (fate == 1) return failed; \
    } while (0)

/* -- making and removing */

#define OPEN(name) \
    int name(const char *file, int flags, ...) { \
        char path[PATH_MAX]; \
        va_list rest; \
        va_start(rest, flags); \
        mode_t bits = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & (O_CREAT | O_TRUNC)) GUARD("open", at(AT_FDCWD, file, path), 1, -1); \
        return REAL(name)(file, flags, bits); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *file, int flags, ...) { \
        char path[PATH_MAX]; \
        va_list rest; \
        va_start(rest, flags); \
        mode_t bits = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & (O_CREAT | O_TRUNC)) GUARD("open", at(folder, file, path), 1, -1); \
        return REAL(name)(folder, file, flags, bits); \
    }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) \
    FILE *name(const char *restrict file, const char *restrict how) { \
        char path[PATH_MAX]; \
        if (how[0] != 'r') GUARD("open", at(AT_FDCWD, file, path), 1, NULL); \
        return REAL(name)(file, how); \
    }
FOPEN(fopen)
FOPEN(fopen64)

int mkdir(const char *name, mode_t bits) {
    char path[PATH_MAX];
    GUARD("mkdir", at(AT_FDCWD, name, path), 1, -1);
    return REAL(mkdir)(name, bits);
}
int mkdirat(int folder, const char *name, mode_t bits) {
    char path[PATH_MAX];
    GUARD("mkdir", at(folder, name, path), 1, -1);
    return REAL(mkdirat)(folder, name, bits);
}
int unlink(const char *name) {
    char path[PATH_MAX];
    GUARD("unlink", at(AT_FDCWD, name, path), 0, -1);
    return REAL(unlink)(name);
}
int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    GUARD(flags & AT_REMOVEDIR ? "rmdir" : "unlink", at(folder, name, path), 0, -1);
    return REAL(unlinkat)(folder, name, flags);
}
int remove(const char *name) {
    char path[PATH_MAX];
    GUARD("unlink", at(AT_FDCWD, name, path), 0, -1);
    return REAL(remove)(name);
}
int rmdir(const char *name) {
    char path[PATH_MAX];
    GUARD("rmdir", at(AT_FDCWD, name, path), 0, -1);
    return REAL(rmdir)(name);
}
int rename(const char *from, const char *to) {
    char path[PATH_MAX];
    GUARD("rename", at(AT_FDCWD, to, path), 0, -1);
    return REAL(rename)(from, to);
}
int renameat(int first, const char *from, int second, const char *to) {
    char path[PATH_MAX];
    GUARD("rename", at(second, to, path), 0, -1);
    return REAL(renameat)(first, from, second, to);
}

/* -- contents */

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    int fate = armed ? hit("write", of_fd(fd, path), 1) : 0;
    if (fate == 2) {
        REAL(write)(fd, data, size / 2);
        die();
    }
    return fate ? -1 : REAL(write)(fd, data, size);
}
#define PWRITE(name, offset) \
    ssize_t name(int fd, const void *data, size_t size, offset where) { \
        char path[PATH_MAX]; \
        int fate = armed ? hit("write", of_fd(fd, path), 1) : 0; \
        if (fate == 2) { \
            REAL(name)(fd, data, size / 2, where); \
            die(); \
        } \
        return fate ? -1 : REAL(name)(fd, data, size, where); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
ssize_t writev(int fd, const struct iovec *parts, int number) {
    char path[PATH_MAX];
    if (armed) GUARD("write", of_fd(fd, path), 1, -1);
    return REAL(writev)(fd, parts, number);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    char path[PATH_MAX];
    if (armed) GUARD("write", of_fd(to, path), 1, -1);
    return ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(to, from, offset, size);
}
size_t fwrite(const void *data, size_t size, size_t number, FILE *file) {
    char path[PATH_MAX];
    int fate = armed ? hit("write", of_fd(fileno(file), path), 1) : 0;
    if (fate == 2) {
        REAL(fwrite)(data, size, number / 2, file);
        fflush(file);
        die();
    }
    return fate ? 0 : REAL(fwrite)(data, size, number, file);
}
int ftruncate(int fd, off_t length) {
    char path[PATH_MAX];
    if (armed) GUARD("truncate", of_fd(fd, path), 1, -1);
    return REAL(ftruncate)(fd, length);
}
int ftruncate64(int fd, off64_t length) {
    char path[PATH_MAX];
    if (armed) GUARD("truncate", of_fd(fd, path), 1, -1);
    return REAL(ftruncate64)(fd, length);
}
int fsync(int fd) {
    char path[PATH_MAX];
    if (armed) GUARD("fsync", of_fd(fd, path), 1, -1);
    return REAL(fsync)(fd);
}
int fdatasync(int fd) {
    char path[PATH_MAX];
    if (armed) GUARD("fsync", of_fd(fd, path), 1, -1);
    return REAL(fdatasync)(fd);
}
