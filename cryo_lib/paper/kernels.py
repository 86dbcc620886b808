"""Kernels whose replies are not missed: their clients look at the shell channel anew every second.

jupyter_client sends on a channel behind the back of the event loop that waits for it, as happens while a widget shows a
picture. A reply that comes at that moment wakes nobody, and a notebook whose last cell is a slider never ends.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from queue import Empty
from typing import Any

from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.manager import AsyncKernelManager
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
    """What nbclient and papermill start a kernel with: `kernel_manager_class`."""

    client_factory = Type(Client, AsyncKernelClient)
