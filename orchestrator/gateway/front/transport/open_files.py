"""How many files a process that takes connections may open."""

import resource

_MANY_FILES = 1 << 16


def allow_many_connections() -> None:
    """Use all file descriptors that the system allows.

    libzmq (4.3.5, ipc_listener.cpp) aborts the process when accepting a connection fails with EMFILE, and a few hundred
    clients reach the usual soft limit of 1024.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
