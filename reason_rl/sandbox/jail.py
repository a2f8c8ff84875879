"""The jailed process: a fresh interpreter that locks itself in, then serves as candidate or examiner for one
exam.

    keeper      this process, trusted: makes the namespaces and their file system, waits, dies with its parent
      init      process 1 of the new namespace: when it ends, the kernel kills everything inside
        payload   under resource limits, Landlock and seccomp; untrusted code runs here and only here

Without namespaces the keeper's child is the payload. Every requested mechanism is applied completely, or the
jail fails and names the one that failed. Inside: an empty network, a read-only root with the Python library
and /dev/null, and a scratch folder. There is no program to start, and no file of the trainer to read.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from . import syscalls

FAILED = 125
MAX_FILES = 1 << 20
SYSTEM_FILES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/usr/share/zoneinfo",
                "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
MOUNT_POINT = "/sys"  # any folder with nothing that a jail needs; only this jail sees it covered
NEW_SPACES = (syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
              | syscalls.CLONE_NEWCGROUP)


def main() -> NoReturn:
    # Read the task and import the payload's code, while the file system is still the machine's.
    spec = json.loads(sys.stdin.buffer.read())
    status = spec["status"]
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    channel = socket.socket(fileno=spec["channel"])
    with _named("start", status):
        payload = _payload(spec, channel)
        spec["capabilities"] = syscalls.permitted_capabilities()  # reads /proc, which the jail lacks
        _die_with(spec["parent"])

    # Enter the namespaces, and fork the child into them.
    if "namespaces" in spec["use"]:
        with _named("namespaces", status):
            _enter_namespaces(spec)
    spec["keeper"], end = os.pipe()  # reads as closed once the keeper is gone
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until the handler below can forward it
    child = os.fork()
    if not child:
        os.close(end)
        _run_child(spec, payload)

    # The keeper: forward SIGTERM as SIGKILL, hold no descriptor (so that pipes end with the payload), wait.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for first, after in ((3, end), (end + 1, MAX_FILES)):
        os.closerange(first, after)
    _, code = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(code) % 256)


def _payload(spec: dict[str, Any], channel: socket.socket) -> Callable[[], None]:
    """The candidate's or examiner's main function. Imported now: the jail cannot read our files."""
    if spec["role"] == "examiner":
        from .examiner import examine

        def run_examiner() -> None:
            verdict = examine(channel, spec)
            os.write(spec["answer"], json.dumps(verdict).encode())
        return run_examiner
    os.close(spec["answer"])
    from .candidate import serve
    return lambda: serve(channel, spec["source"])


@contextmanager
def _named(mechanism: str, status: int) -> Iterator[None]:
    """If the body raises, writes the mechanism's name and the error to the status pipe and exits."""
    try:
        yield
    except BaseException as error:
        os.write(status, f"{mechanism}: {error}"[:500].encode())
        os._exit(FAILED)


def _die_with(parent: int) -> None:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the parent is gone")


def _run_child(spec: dict[str, Any], payload: Callable[[], None]) -> NoReturn:
    # Give up privileges, and die with the keeper.
    status, use = spec["status"], spec["use"]
    is_init = "namespaces" in use
    with _named("start", status):
        if os.geteuid() and not is_init:  # RLIMIT_NPROC counts all threads of this user, so add those of today
            spec["threads"] += sum(_num_threads(name) for name in os.listdir("/proc") if name.isdigit())
        _become_nobody(spec)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([spec["keeper"]], [], [], 0)[0]:
            raise OSError("the keeper is gone")
        os.close(spec["keeper"])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    if "landlock" in use:
        with _named("landlock", status):
            syscalls.restrict_by_landlock(filter(os.path.exists, _readable()), filter(os.path.exists, DEVICES), spec["scratch"])

    # As process 1 of a namespace: fork the payload, and reap until it ends.
    if is_init and (child := os.fork()):
        _reap_until(child)

    # The payload: resource limits, the system-call filter, then untrusted code.
    with _named("rlimits", status):
        os.setsid()
        if is_init:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(spec["scratch"])
        _limit(spec)
    if "seccomp" in use:
        with _named("seccomp", status):
            syscalls.set_seccomp_filter()
    os.write(status, b"held")
    os.close(status)
    try:
        payload()
    finally:
        os._exit(0)


def _reap_until(child: int) -> NoReturn:
    os.closerange(0, MAX_FILES)
    while True:
        ended, code = os.wait()
        if ended == child:
            os._exit(os.waitstatus_to_exitcode(code) % 256)


def _num_threads(pid: str) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task")) if os.stat(f"/proc/{pid}").st_uid == os.getuid() else 0
    except OSError:  # the process has ended meanwhile
        return 0


def _limit(spec: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: spec["cpu_s"], resource.RLIMIT_AS: spec["memory_bytes"], resource.RLIMIT_FSIZE: spec["file_bytes"],
        resource.RLIMIT_NPROC: spec["threads"] + 2, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in limits.items():
        _, most = resource.getrlimit(name)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        # Processor time has a second limit one second later: SIGXCPU at the first, SIGKILL at the second.
        resource.setrlimit(name, (value, value + (name == resource.RLIMIT_CPU and value != most)))


def _enter_namespaces(spec: dict[str, Any]) -> None:
    user, group = os.geteuid(), os.getegid()
    try:
        if user:
            raise PermissionError
        syscalls.unshare(NEW_SPACES)
    except PermissionError:  # an ordinary user: a user namespace gives the rights to make the others
        syscalls.unshare(NEW_SPACES | syscalls.CLONE_NEWUSER)
        spec["user"] = 0  # only our own user is mapped into it
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _build_root(MOUNT_POINT, spec["file_bytes"])
    spec["scratch"] = "/scratch"


def _build_root(root: str, scratch_bytes: int) -> None:
    """Changes to a new root in memory, mounted on `root`: the paths of `_readable`, devices, /scratch."""
    # The mount, and symbolic links such as /lib -> usr/lib.
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("jail", root, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "size=1m,mode=0755")
    links = [path for path in _readable() if os.path.islink(path)]
    for path in links:
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(os.readlink(path), root + path)

    # Bind each path read-only.
    for path in (*_readable(), *DEVICES):
        if path in links or not os.path.exists(path) or os.path.exists(root + path):
            continue
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        if os.path.isdir(path):
            os.mkdir(root + path)
        else:
            open(root + path, "x").close()
        syscalls.mount(path, root + path, "", syscalls.MS_BIND | syscalls.MS_REC)
        syscalls.make_read_only(root + path, is_device=path in DEVICES)

    # Change to it; only /scratch is writable.
    os.mkdir(f"{root}/scratch")
    syscalls.change_root(root)
    syscalls.make_read_only("/")
    syscalls.mount("scratch", "/scratch", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC,
                   f"size={scratch_bytes},nr_inodes=1000,mode=0777")


def _readable() -> list[str]:
    """The Python library and the libraries it links to. Shortest first: no path is inside a later one."""
    library = {os.path.realpath(path) for path in sys.path if os.path.isdir(path)} | {f"{sys.base_prefix}/lib"}
    return sorted(library | set(SYSTEM_FILES), key=len)


def _become_nobody(spec: dict[str, Any]) -> None:
    """Drops privileges. Root has no process limit and may write its own files, so it becomes a user without a
    name.

    The Python library may be in root's home. Namespaces mount it where everyone can read it. With Landlock
    alone one capability is kept, to read files that only root can read; Landlock restricts it to the allowed
    paths.
    """
    may, kept = spec["capabilities"], 0
    needed = syscalls.CAP_CHOWN | syscalls.CAP_SETGID | syscalls.CAP_SETUID
    if os.geteuid() == 0 and spec["user"] and may & needed == needed:
        if spec["use"] == ["landlock", "seccomp"]:
            kept = may & syscalls.CAP_DAC_READ_SEARCH or may & syscalls.CAP_DAC_OVERRIDE
            syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)

        # The groups first: a user without rights may not change them.
        os.chown(spec["scratch"], spec["user"], spec["user"])
        os.setgroups([])
        os.setresgid(*[spec["user"]] * 3)
        os.setresuid(*[spec["user"]] * 3)
    syscalls.drop_capabilities(kept)
