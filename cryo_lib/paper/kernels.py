"""Kernels whose replies are not missed: their clients look at the shell channel anew every second.

jupyter_client sends on a channel behind the back of the event loop that waits for it, as happens while a widget shows a
picture. A reply that comes at that moment wakes nobody, and a notebook whose last cell is a slider never ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import Any

from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from traitlets import Type

EVERY = 1.0  # s


class Channel(AsyncZMQSocketChannel):
    """A channel that is looked at every so often while it is waited for."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message; `queue.Empty` where none comes within `timeout` seconds, None: wait for ever."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while end - time.monotonic() > EVERY:
            with suppress(Empty):
                return await super().get_msg(EVERY)
        return await super().get_msg(max(end - time.monotonic(), 0.0))


class Client(AsyncKernelClient):
    """A client of a kernel with such a channel for replies."""

    shell_channel_class = Type(Channel)


class Manager(AsyncKernelManager):
    """A kernel, with such a client."""

    client_factory = Type(Client, AsyncKernelClient)


@contextmanager
def started(*arguments: str) -> Iterator[Manager]:
    """The Python kernel, as nbclient and papermill take it (`km`), with further arguments: it begins, and ends here."""
    manager = Manager(kernel_name="python3")
    run_sync(manager.start_kernel)(extra_arguments=[*arguments])
    try:
        yield manager
    finally:
        run_sync(manager.shutdown_kernel)()
