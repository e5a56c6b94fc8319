"""What the tests of shared memory do in other processes.

As a script it imports torch once, then forks a process for each order on its standard input. These
processes are no children of multiprocessing. ``serve`` also runs in one that is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import torch

from asyncrlhf.errors import WeightUpdateError
from asyncrlhf.transport import SharedMemory, checksum


def serve(connection: Any) -> None:
    """Do what is asked with snapshots that arrive pickled."""
    held: Any = None
    while True:
        task, *values = connection.recv()
        if task == "check":
            try:
                (snapshot,) = values
                connection.send((snapshot.version, checksum(snapshot)))
            except WeightUpdateError as error:
                connection.send(str(error))
        elif task == "hold":
            held = [tensor for _, tensor in values.pop()]
            values.clear()
            connection.send(len(held))
        elif task == "held":
            connection.send([tensor.tolist() for tensor in held])
        elif task == "race":
            connection.send(race(connection))
        elif task == "end":
            return


def race(connection: Any) -> dict[str, int]:
    """Read the newest snapshot again and again while newer ones are published."""
    counts = {"correct": 0, "wrong": 0, "late": 0, "torn": 0}
    connection.send_bytes(b"next")
    while (snapshot := connection.recv()) is not None:
        begun = 0

        def slowly(pairs: Any) -> Iterator[Any]:
            nonlocal begun
            for pair in pairs:
                begun += 1
                if begun == 3 and sum(counts.values()) % 4 == 0:
                    time.sleep(0.005)  # most likely overtaken meanwhile
                yield pair

        try:
            got = checksum(slowly(snapshot))
            counts["correct" if got == snapshot.checksum else "wrong"] += 1
        except WeightUpdateError:
            counts["torn" if begun else "late"] += 1
        connection.send_bytes(b"next")
    return counts


created: list[SharedMemory] = []  # until the process ends


def create(folder: str, ending: str) -> None:
    """Publish, say where, and end in one of several ways."""
    transport = SharedMemory()
    created.append(transport)
    kept = transport.publish([("a", torch.ones(1000))], 0)
    part = Path(folder, "name.part")
    part.write_text(kept.name)
    part.rename(Path(folder, "name"))
    if ending == "killed":
        time.sleep(600)
    if ending == "closed":
        transport.close()
    if ending == "raised":
        raise RuntimeError("on purpose")
    if ending == "forked":
        child = os.fork()
        if child == 0:
            return
        os.waitpid(child, 0)
        assert Path("/dev/shm", kept.name).exists()
    if ending == "removed by others":
        Path("/dev/shm", kept.name).unlink()


def connect(address: str) -> None:
    with Client(address, authkey=b"tests") as connection:
        serve(connection)


def main() -> None:
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        if order == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(arguments[0], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                output = os.open(arguments.pop(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(output, 2)
                {"create": create, "connect": connect}[order](*arguments)
                return
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
elif __name__ == "spawned":
    serve(globals()["connection"])
