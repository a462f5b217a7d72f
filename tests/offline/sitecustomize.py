"""Every Python that finds this file first on its path reaches no other machine: it is told so at once.

A machine without a network may let a program wait for minutes instead. Who tried what is noted in the file
that NBHELPERS_TRIED names. What a library does outside Python's own sockets is not seen.
"""

import errno
import ipaddress
import os
import socket
import sys

LOCAL = {"", "localhost", "0.0.0.0", "::", socket.gethostname()}
PLACE = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}


def is_local(host: object) -> bool:
    if not isinstance(host, str):  # a path, None for this machine, a number of the kernel
        return True
    try:
        return host in LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def refuse(event: str, arguments: tuple) -> None:
    if event not in PLACE:
        return
    place = arguments[PLACE[event]]
    host = place[0] if isinstance(place, tuple) else place if PLACE[event] == 0 else None
    host = host.decode() if isinstance(host, bytes) else host
    if not is_local(host):
        with open(os.environ["NBHELPERS_TRIED"], "a") as file:  # noqa: PTH123
            file.write(f"{event} {host}\n")
        raise OSError(errno.ENETUNREACH, f"no network: {event} {host}")


sys.addaudithook(refuse)
