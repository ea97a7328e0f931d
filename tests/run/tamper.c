// Tries to change an input in every way there is, and tells how each try was answered: "NAME ERRNO", 0 where it succeeded.
// Its argument is a directory with a file called "file".
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

static void told(const char *name, int failed) { printf("%s %d\n", name, failed ? errno : 0); }

int main(int argc, char **argv) {
    (void)argc;
    if (chdir(argv[1]) != 0) return 1;
    int fd = open("file", O_RDONLY);
    int dir = open(".", O_RDONLY | O_DIRECTORY);
    if (fd < 0 || dir < 0) return 1;
    struct timespec times[2] = {{9, 9}, {9, 9}};
    char again[64];
    snprintf(again, sizeof again, "/proc/self/fd/%d", fd);

    told("open", open("file", O_RDWR) < 0);
    told("append", open("file", O_WRONLY | O_APPEND) < 0);
    told("truncate-open", open("file", O_WRONLY | O_TRUNC) < 0);
    told("truncate", truncate("file", 0) != 0);
    told("reopen", open(again, O_RDWR) < 0);
    told("direct", open("file", O_RDWR | O_DIRECT) < 0);
    told("tmpfile", open(".", O_RDWR | O_TMPFILE, 0600) < 0);
    told("create", open("new", O_CREAT | O_WRONLY, 0600) < 0);
    told("chmod", chmod("file", 0777) != 0);
    told("fchmod", fchmod(fd, 0777) != 0);
    told("fchmod-dir", fchmod(dir, 0777) != 0);
    told("chown", fchown(fd, getuid(), getgid()) != 0);
    told("utimes", futimens(fd, times) != 0);
    told("utimes-dir", futimens(dir, times) != 0);
    told("setxattr", fsetxattr(fd, "user.x", "x", 1, 0) != 0);
    int flags = 0;
    told("setflags", ioctl(fd, FS_IOC_GETFLAGS, &flags) != 0 || ioctl(fd, FS_IOC_SETFLAGS, &flags) != 0);
    told("fallocate", fallocate(fd, 0, 0, 4096) != 0);
    told("rename", rename("file", "other") != 0);
    told("exchange", renameat2(AT_FDCWD, "file", AT_FDCWD, "link", RENAME_EXCHANGE) != 0);
    told("link", linkat(AT_FDCWD, "file", AT_FDCWD, "hard", 0) != 0);
    told("link-out", linkat(AT_FDCWD, "file", AT_FDCWD, "/build/hard", 0) != 0);
    told("symlink", symlink("x", "soft") != 0);
    told("mkdir", mkdir("sub", 0700) != 0);
    told("unlink", unlink("file") != 0);
    told("unlink-link", unlink("link") != 0);
    told("rmdir", rmdir("empty") != 0);
    told("map-shared", mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
    void *map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    told("map-later", map == MAP_FAILED || mprotect(map, 4096, PROT_READ | PROT_WRITE) != 0);
    // One's own copy may be changed.
    char *own = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (own == MAP_FAILED) return 1;
    memcpy(own, "private", 7);
    return 0;
}
