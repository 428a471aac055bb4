"""Reading ahead: an iterator that runs in a thread of its own while its consumer works."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], depth: int = 2) -> Generator[Item, None, None]:
    """The same items, up to `depth` of them made before they are asked for. Close it to stop the thread."""
    ready: queue.Queue[tuple[Item] | BaseException] = queue.Queue(depth)
    stopped = threading.Event()

    def put(made: tuple[Item] | BaseException) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(made, timeout=0.1)
                return

    def make() -> None:
        try:
            for item in items:
                put((item,))
                if stopped.is_set():
                    return
            put(StopIteration())
        except BaseException as error:  # whatever it is, it belongs to the consumer's thread
            put(error)
        finally:
            if isinstance(items, Generator):
                items.close()  # in the thread that ran it

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while not isinstance(made := ready.get(), BaseException):
            yield made[0]
        if not isinstance(made, StopIteration):
            raise made
    finally:
        stopped.set()
        thread.join()
