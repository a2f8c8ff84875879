"""System calls that Python does not wrap: namespaces and mounts, Landlock, seccomp, prctl.

jail.py calls them in the child, before untrusted code runs. Each raises OSError with the call's name. Only
x86-64 and aarch64 have a table of system call numbers; on other machines `set_seccomp_filter` raises, and
jails lack seccomp.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
from collections.abc import Iterable, Sequence

LIBC = ctypes.CDLL(None, use_errno=True)

# Numbers that are the same on every architecture.
MOUNT_SETATTR, LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 442, 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 24, 38
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SETGID, CAP_SETUID = 1, 1 << 1, 1 << 2, 1 << 6, 1 << 7
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_THREAD = 0x10000
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

# Landlock's rights on files. A ruleset withholds every right that the kernel knows, then grants these on some
# paths.
READ = 1 << 2 | 1 << 3  # files, folders
DEVICE = 1 << 1 | 1 << 2
SCRATCH = READ | 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14  # write, remove and make plain files, truncate
FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
ABI_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}

# Calls denied inside a jail: name, number on x86-64, number on aarch64 (- if it has none).
DENIED_TABLE = """
# new processes and programs
fork 57 -  vfork 58 -  execve 59 221  execveat 322 281
# other processes, their priorities too
kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240  ptrace 101 117
process_vm_readv 310 270  process_vm_writev 311 271  pidfd_open 434 434  pidfd_getfd 438 438  pidfd_send_signal 424 424
kcmp 312 272  setpriority 141 140  ioprio_set 251 30  sched_setaffinity 203 122  sched_setscheduler 144 119
sched_setparam 142 118  sched_setattr 314 274  migrate_pages 256 238  move_pages 279 239  process_madvise 440 440
process_mrelease 448 448
# the network
socket 41 198
# namespaces and mounts
unshare 272 97  setns 308 268  mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51  move_mount 429 429
open_tree 428 428  fsopen 430 430  fsmount 432 432  fsconfig 431 431  fspick 433 433  mount_setattr 442 442
open_by_handle_at 304 265  open_tree_attr 467 467
# kernel interfaces that a function under test never needs
keyctl 250 219  add_key 248 217  request_key 249 218  bpf 321 280  perf_event_open 298 241  userfaultfd 323 282
io_uring_setup 425 425  personality 135 92  fanotify_init 300 262  init_module 175 105  finit_module 313 273  kexec_load 246 104
acct 163 89  syslog 103 116  quotactl 179 60  quotactl_fd 443 443  mknodat 259 33  mknod 133 -
# memory and messages outside of files
memfd_create 319 279  memfd_secret 447 447  shmget 29 194  shmat 30 196  shmctl 31 195  semget 64 190  semop 65 193
semtimedop 220 192  semctl 66 191  msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187  mq_open 240 180
mq_unlink 241 181
# changes to files that Landlock does not restrict, or did not in its first versions
truncate 76 45  inotify_init 253 -  inotify_init1 294 26  chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452
chown 92 -  fchown 93 55  lchown 94 -  fchownat 260 54  utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88
setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16
setxattrat 463 463  removexattrat 466 466  file_setattr 469 469
"""
DENIED = [(int(x86), None if arm == "-" else int(arm)) for x86, arm in re.findall(r"\w+ (\d+) (\d+|-)", DENIED_TABLE)]
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH
PRCTL, PRLIMIT, CLONE, SOCKETPAIR, FCNTL, IOCTL, CLONE3 = (157, 167), (302, 261), (56, 220), (53, 199), (72, 25), (16, 29), 435
F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP, TIOCSTI = 8, 10, 15, 0x8901, 0x8902, 0x5412
ALLOW, KILL, DENY, NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x50001, 0x50026  # errno EPERM; ENOSYS: libc then takes clone
LOAD, JUMP_IF_EQUAL, JUMP_IF_ABOVE, JUMP_IF_ANY, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ARG0, ARG1 = 16, 24


def _checked(what: str, result: int) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


def _syscall(what: str, number: int, *arguments: int | ctypes.Array[ctypes.c_char] | bytes | None) -> int:
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(what, LIBC.syscall(ctypes.c_long(number), *words))


def prctl(option: int, value: int, pointer: int = 0) -> None:
    zero = ctypes.c_ulong(0)
    _checked(f"prctl {option}", LIBC.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(pointer), zero, zero))


def unshare(flags: int) -> None:
    _checked("unshare", LIBC.unshare(flags))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (text.encode() for text in (source, target, kind))
    _checked(f"mount {kind or source} on {target}", LIBC.mount(*arguments, ctypes.c_ulong(flags), options.encode()))


def make_read_only(path: str, is_device: bool = False) -> None:
    """Makes the mount at `path` read-only, with all mounts below it."""
    attributes = struct.pack("QQQQ", ATTR_RDONLY | ATTR_NOSUID | (0 if is_device else ATTR_NODEV), 0, 0, 0)
    _syscall(f"mount_setattr {path}", MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, len(attributes))


def change_root(path: str) -> None:
    """Makes `path` the root, and unmounts the old root."""
    os.chdir(path)
    column, _ = ARCHITECTURES[platform.machine()]
    _syscall("pivot_root", (155, 41)[column], b".", b".")
    _checked("umount2", LIBC.umount2(b".", MNT_DETACH))
    os.chdir("/")


def permitted_capabilities() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm"))


def drop_capabilities(kept: int = 0) -> None:
    """Drops all capabilities but the bit mask `kept`, from the bounding set too if that is allowed."""
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    header, sets = struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", kept, kept, 0, 0, 0, 0)  # version 3: low words first
    _checked("capset", LIBC.capset(header, sets))


def landlock_abi() -> int:
    """Landlock's version, from 1; raises OSError if the kernel has no Landlock."""
    return _syscall("landlock_create_ruleset", LANDLOCK_CREATE_RULESET, None, 0, 1)


def restrict_by_landlock(readable: Iterable[str], devices: Iterable[str], scratch: str) -> None:
    """Allows only these paths; forbids TCP, outside signals and abstract sockets as far as the kernel can."""
    # A ruleset that withholds everything.
    abi = landlock_abi()
    files = ABI_FILE_RIGHTS[min(abi, max(ABI_FILE_RIGHTS))]
    attributes = struct.pack("QQQ", files, 0b11, 0b11)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall("landlock_create_ruleset", LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)

    # The rights granted on each path, then the ruleset takes effect.
    granted = [*((p, READ) for p in readable), *((p, DEVICE) for p in devices), (scratch, SCRATCH)]
    for path, rights in granted:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        mask = files if os.path.isdir(path) else files & FILE_RIGHTS
        _syscall(f"landlock_add_rule {path}", LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights & mask, folder), 0)
        os.close(folder)
    _syscall("landlock_restrict_self", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def set_seccomp_filter() -> None:
    """From now on the calls in `DENIED` fail with EPERM, and some others with certain arguments."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(f"seccomp: no table of system calls for {machine}")
    column, audit_arch = ARCHITECTURES[machine]
    program = _filter(column, audit_arch)
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(lines)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))


def _none_of(*values: int) -> list[tuple[int, int, int, int]]:
    """Tests that the second argument is none of these: loads it, and skips the permission if it is one."""
    return [(LOAD, 0, 0, ARG1), *((JUMP_IF_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values))]


def _filter(column: int, audit_arch: int) -> list[tuple[int, int, int, int]]:
    """The filter as Berkeley Packet Filter instructions (code, jump if true, jump if false, operand)."""
    # Kill a call of another architecture; load the call's number.
    lines = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, audit_arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if column == 0:
        lines += [(JUMP_IF_ABOVE, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]  # x32 has a second set of numbers

    # Calls that are allowed with certain arguments.
    rules: Sequence[tuple[int, list[tuple[int, int, int, int]]]] = [
        (PRCTL[column], [(LOAD, 0, 0, ARG0), (JUMP_IF_EQUAL, 1, 0, PR_SET_PDEATHSIG)]),  # cannot outlive its parent
        (PRLIMIT[column], [(LOAD, 0, 0, ARG0), (JUMP_IF_EQUAL, 0, 1, 0)]),  # its own limits only
        (CLONE[column], [(LOAD, 0, 0, ARG0), (JUMP_IF_ANY, 0, 1, CLONE_THREAD)]),  # threads, no processes
        (SOCKETPAIR[column], [(LOAD, 0, 0, ARG1), (AND, 0, 0, 0xF), (JUMP_IF_EQUAL, 0, 1, 1)]),  # streams: no addresses
        (FCNTL[column], _none_of(F_SETOWN, F_SETSIG, F_SETOWN_EX)),  # a descriptor could signal any process
        (IOCTL[column], _none_of(FIOSETOWN, SIOCSPGRP, TIOCSTI)),
    ]

    # Each call's test, then the denied numbers; everything else is allowed.
    for number, test in rules:
        lines += [(JUMP_IF_EQUAL, 0, len(test) + 2, number), *test, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY)]
    lines += [(JUMP_IF_EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, NO_SUCH_CALL)]
    for numbers in DENIED:
        if (number_here := numbers[column]) is not None:
            lines += [(JUMP_IF_EQUAL, 0, 1, number_here), (RETURN, 0, 0, DENY)]
    return [*lines, (RETURN, 0, 0, ALLOW)]
