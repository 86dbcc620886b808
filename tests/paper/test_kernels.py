"""A reply whose wake-up is lost is found all the same."""

import asyncio
import queue
import time

import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from cryo_lib.paper.kernels import Channel, Client, Manager


def receive(send, timeout=None):
    """What a channel receives of a peer that does `send(peer, socket)` while it waits."""

    async def wait():
        with zmq.asyncio.Context() as context, context.socket(zmq.PAIR) as socket, zmq.Context() as other:
            socket.bind("tcp://127.0.0.1:*")
            with other.socket(zmq.PAIR) as peer:
                peer.connect(socket.getsockopt(zmq.LAST_ENDPOINT).decode())
                task = asyncio.create_task(Channel(socket, Session(key=b"key"), None).get_msg(timeout))
                await asyncio.sleep(0.2)
                send(peer, socket)
                return await asyncio.wait_for(task, 30)

    return asyncio.run(wait())


def test_a_reply_is_found_though_its_wake_up_was_spent_by_another_use_of_the_socket():
    def send(peer, socket):
        Session(key=b"key").send(peer, "execute_reply", {"status": "ok"})
        time.sleep(0.2)
        zmq.Socket.shadow(socket.underlying).getsockopt(zmq.EVENTS)  # as whatever sends through a shadow of it

    assert receive(send)["content"] == {"status": "ok"}


@pytest.mark.parametrize("timeout", [0.3, 1.5])
def test_where_nothing_comes_in_time_that_is_said(timeout):
    started = time.monotonic()
    with pytest.raises(queue.Empty):
        receive(lambda peer, socket: None, timeout)
    assert time.monotonic() - started > timeout


def test_kernels_of_notebooks_have_such_a_channel():
    assert isinstance(Manager().client(), Client) and Client.shell_channel_class.klass is Channel
