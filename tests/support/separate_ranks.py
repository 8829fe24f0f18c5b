"""Ranks in separate processes, for failures that must not hit the ranks that tests share."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tests.support.processes import forked


def run_separately(
    world_size: int, fn: Callable[..., Any], *args: object, seconds: float = 100.0
) -> dict[int, Any]:
    """Calls `fn(*args)` on the ranks of a new gloo group; one that dies leaves the others alone.

    The ranks meet at a TCP store that rank 0 serves, as in a launched job.

    Returns:
        Rank -> result, for the ranks that did not die.

    Raises:
        AssertionError: if a rank raises, or does not answer in time.
    """
    context = forked()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe() for _ in range(world_size)]
    processes = [
        context.Process(target=_serve, args=(far, rank, world_size, port, fn, args), daemon=True)
        for rank, (_, far) in enumerate(pipes)
    ]
    for process, (_, far) in zip(processes, pipes, strict=True):
        process.start()
        far.close()
    deadline = time.monotonic() + seconds
    results, errors = {}, {}
    for rank, (near, _) in enumerate(pipes):
        if not near.poll(max(0.0, deadline - time.monotonic())):
            errors[rank] = f"no answer after {seconds:g} s"
            continue
        # A rank that died has closed its end.
        with suppress(EOFError, ConnectionResetError):
            succeeded, content = pickle.loads(near.recv_bytes())
            (results if succeeded else errors)[rank] = content
    for process in processes:
        process.kill()
        process.join()
    assert not errors, "\n".join(f"rank {rank}: {error}" for rank, error in errors.items())
    return results


def _serve(
    connection: Connection,
    rank: int,
    world_size: int,
    port: int,
    fn: Callable[..., Any],
    args: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://localhost:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        outcome = (True, fn(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(outcome))
    # The others may still need the store that rank 0 serves: all are ended together.
    threading.Event().wait()
