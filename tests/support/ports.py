"""Ports for process groups that are made later, below those that the kernel gives to any program."""

import random
import socket

LOWEST, HIGHEST = 15000, 32000


def free_ports(number: int) -> list[int]:
    """Different ports on which nobody listens now."""
    found: list[int] = []
    for port in random.sample(range(LOWEST, HIGHEST), HIGHEST - LOWEST):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == number:
            return found
    raise OSError(f"no {number} free ports between {LOWEST} and {HIGHEST}")
