"""A network namespace with only a loopback interface, so that other machines cannot reach the
ports that Ray opens on every interface."""

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
IFF_UP, IFF_LOOPBACK = 0x1, 0x8


def enter() -> None:
    """Moves this process, which must have one thread, into a new network namespace. Raises OSError
    if the system does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    # Root needs no user namespace, in which it would lose its rights over others' files.
    if libc.unshare(CLONE_NEWNET):
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "no network namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", IFF_UP | IFF_LOOPBACK)
        fcntl.ioctl(control, SIOCSIFFLAGS, request)


def is_alone() -> bool:
    """Whether only loopback is up, so that no other machine can reach this process's ports."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            request = struct.pack("16sH14x", name.encode(), 0)
            flags = struct.unpack("16sH14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
            if flags & IFF_UP and not flags & IFF_LOOPBACK:
                return False
    return True


def is_possible() -> bool:
    """Whether this system allows such a namespace. It is tried in another process."""
    probe = [sys.executable, "-c", "from handler.batch.namespace import enter; enter()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(probe, env=environment, capture_output=True).returncode == 0


def restart() -> None:
    """Replaces this process with the same command in a new namespace."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "handler.batch.loopback", *sys.argv[1:]])
