"""A PostgreSQL server of its own in a folder, for the time of a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path

USER = "postgres"


def programs() -> Path | None:
    """The folder of ``initdb`` and ``pg_ctl``, which Debian does not put on the path; None: not installed, or no driver."""
    found = [
        Path(path).parent
        for path in [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
        if path
    ]
    return found[-1] if found and find_spec("psycopg") else None


@contextlib.contextmanager
def server() -> Iterator[Callable[[], str]]:
    """Gives URLs of new databases. The server refuses to be root, so that root lets the user that its package made run it."""
    folder, bin = Path(tempfile.mkdtemp(prefix="postgres")), programs()
    assert bin is not None
    user = USER if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [str(bin / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)

    # No flush: what is lost with the machine is nobody's.
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    numbers = count()

    def database() -> str:
        name = f"db{next(numbers)}"
        connection = ["-h", "127.0.0.1", "-p", str(port), "-U", USER]
        subprocess.run([str(bin / "createdb"), *connection, name], check=True, cwd=folder)
        return f"postgresql+psycopg://{USER}@127.0.0.1:{port}/{name}"

    try:
        run("initdb", "-U", USER, "-A", "trust", "--no-sync")
        run("pg_ctl", "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield database
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
