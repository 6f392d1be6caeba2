"""The process from which warm ones are forked; see the package. It ends when its input does."""

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

MODULES = (
    *("torch", "torch.distributed", "torch.nn.attention.flex_attention", "deepspeed", "deepspeed.utils"),
    *("aiohttp", "jsonschema", "msgpack", "requests"),
    *("mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.tracking.rest_store"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "s3fs", "fsspec.implementations.local", "psutil"),
    *("omegaconf", "rich.progress", "rich.table", "typer", "safetensors.numpy", "tokenizers"),
)


def serve(folder: str) -> dict[str, Any]:
    """Fork a process for each request, and return it there; here it returns never."""
    children: dict[int, socket.socket] = {}
    ears, mouth = socket.socketpair()
    for one in (ears, mouth):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as events:
        listener.bind(f"{folder}/binding")
        listener.listen(100)
        os.rename(f"{folder}/binding", f"{folder}/socket")
        for source in (0, ears, listener):
            events.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fd == 0:
                    for child in children:
                        os.kill(child, signal.SIGKILL)
                    os._exit(0)
                elif key.fileobj is ears:
                    ears.recv(1000)
                    while (ended := _reap()) is not None:
                        client = children.pop(ended[0])
                        with suppress(KeyError):
                            events.unregister(client)
                        with suppress(OSError):
                            client.send(ended[1].to_bytes(8, signed=True))
                        client.close()
                elif key.fileobj is listener:
                    client, _ = listener.accept()
                    size, fds, *_ = socket.recv_fds(client, 8, 3)
                    if not size:
                        client.close()
                        continue
                    request = json.loads(client.recv(int.from_bytes(size), socket.MSG_WAITALL))
                    child = os.fork()
                    if child == 0:
                        signal.set_wakeup_fd(-1)
                        for held in (ears, mouth, client, *children.values()):
                            held.close()
                        return {**request, "fds": fds}
                    for fd in fds:
                        os.close(fd)
                    client.send(child.to_bytes(8))
                    children[child] = client
                    events.register(client, selectors.EVENT_READ, child)
                else:  # Whoever stands for it is dead.
                    events.unregister(key.fileobj)
                    with suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)


def _reap() -> tuple[int, int] | None:
    with suppress(ChildProcessError):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            return child, os.waitstatus_to_exitcode(status)
    return None


def become(request: dict[str, Any]) -> None:
    """Make this process what was asked for, and run it."""
    os.setsid()
    for number, fd in enumerate(request["fds"]):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    script, *words = request["words"]
    if script == "-m":
        module, *words = words
        sys.path[:] = [request["folder"], *request["path"]]
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = [os.path.dirname(script), *request["path"]]
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    become(serve(sys.argv[1]))
