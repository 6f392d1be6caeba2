"""A way to a server of this machine that lets no more than so many bytes per second back: a slow store."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK = 64 << 10


@contextmanager
def throttled(port: int, bytes_per_s: float) -> Iterator[int]:
    """Yield a port whose connections go on to `port`, all of them together at this speed on their way back."""
    loop, free_at = asyncio.new_event_loop(), 0.0

    async def answer(source: asyncio.StreamReader, target: asyncio.StreamWriter, slow: bool) -> None:
        nonlocal free_at
        with suppress(OSError):
            while data := await source.read(CHUNK):
                if slow:
                    free_at = max(free_at, time.monotonic()) + len(data) / bytes_per_s
                    await asyncio.sleep(free_at - time.monotonic())
                target.write(data)
                await target.drain()
        target.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source, target = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(answer(reader, target, slow=False), answer(source, writer, slow=True))

    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1"))
    thread = threading.Thread(target=loop.run_forever, name="throttle", daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
