"""Every Python that has this folder in its path runs this first: some have themselves replaced by a warm process."""

import os
import sys


def _script() -> str:
    """Return what is run, where that is one of those whose imports take long."""
    words = sys.orig_argv[1:]
    if words[:2] == ["-m", "jobs"]:
        return "jobs"
    name = next((os.path.basename(word) for word in words[:1]), "")
    if name == "raymuon" and words[1:2] == ["stack"]:
        return ""  # Its servers are looked for among its children.
    return name if name in ("raymuon", "default_worker.py") else ""


def _replace(folder: str) -> None:
    import json
    import signal
    import socket
    from contextlib import suppress

    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(f"{folder}/socket")
        except OSError:
            return  # It is gone: this one goes its own way.
        told = {"words": sys.orig_argv[1:], "path": sys.path, "environment": dict(os.environ), "folder": os.getcwd()}
        told["ignored"] = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
        data = json.dumps(told).encode()
        socket.send_fds(server, [len(data).to_bytes(8)], [0, 1, 2])
        server.sendall(data)
        process = int.from_bytes(server.recv(8))
        with open(f"{folder}/{os.getpid()}.new", "w") as file:
            file.write(str(process))
        os.rename(file.name, f"{folder}/{os.getpid()}")

        def hand_on(number: int, _: object) -> None:
            with suppress(ProcessLookupError):
                os.kill(process, number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(number, hand_on)
        ended = server.recv(8)
        os.unlink(f"{folder}/{os.getpid()}")
    if not ended:
        os._exit(1)
    code = int.from_bytes(ended, signed=True)
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler.
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if os.environ.get("RAYMUON_TESTS_WARM") and _script() not in ("", os.environ.get("RAYMUON_TESTS_COLD")):
    _replace(os.environ["RAYMUON_TESTS_WARM"])
