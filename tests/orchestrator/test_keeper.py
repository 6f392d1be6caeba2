"""A keeper is reached at whatever address its node has, and answers whatever it is told."""

import json
import resource
import socket
import struct
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.group.keeper import Keeper
from workers.common.wire import MOST_HEAD, Connection
from workers.config import StorageConfig
from workers.reports import ShardWritten
from workers.snapshots.messages import (
    KINDS,
    Ask,
    Done,
    Idle,
    Keep,
    Message,
    Open,
    Opened,
    Push,
    Read,
    RefusedError,
    Save,
    answer,
    decode,
    encode,
    request,
)
from workers.snapshots.region import NOTES_BYTES, Region, RegionSize

OPEN = Open(
    generation=2,
    rank=0,
    world_size=1,
    shard=16,
    replicated=8,
    fragments=(("weight", "w", 0, 4, 0), ("buffer", "b", 0, 2, 4)),
    shapes={"w": [4], "b": [2]},
    buddy=None,
)
KEEP = Keep(generation=2, rank=1, world_size=2, shard=8, replicated=0, step=5)
NOTES = {"counters": {"step": 5}, "rows": [], "validation": None}
READ = Read(path="none", half=0, step=1, offset=0, count=1)


def _has(host: str) -> bool:
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address, family=family):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def keeper() -> Keeper:
    return Keeper("127.0.0.1", "t" * 32, StorageConfig())


@pytest.fixture
def peer(keeper):
    connection = Connection.open(keeper.address())
    connection._sock.settimeout(30)  # A test that fails, not one that waits for ever.
    yield connection
    connection.close()


def assert_serves(peer: Connection) -> None:
    with pytest.raises(RefusedError, match="the snapshot of step 1 is not here any more"):
        request(peer, READ, Done)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_keeper_answers_at_an_address_of_either_family(host):
    if not _has(host):
        pytest.skip(f"this machine has no {host}")
    keeper = Keeper(host, "t" * 32, StorageConfig())
    assert keeper.address().host == host
    connection = Connection.open(keeper.address())
    assert_serves(connection)
    connection.close()


@pytest.mark.parametrize(
    "message", [OPEN, Push(half=1), Save(half=0, run_url="s3://b/r", attempt=3), KEEP, READ, Ask()]
)
def test_a_message_is_the_same_behind_the_wire(message):
    assert decode(encode(message)) == message


def test_every_kind_of_message_has_a_name_of_its_own():
    assert {kind.__name__ for kind in KINDS.values()} == {kind.__name__ for kind in Message.__subclasses__()}


def changed(message: Message, **fields: object) -> bytes:
    return json.dumps({**json.loads(encode(message)), **fields}).encode()


BAD = {
    "op unknown": (changed(READ, op="repair"), "unknown message 'repair'; known are open, push"),
    "op of another type": (changed(READ, op=["read"]), r"unknown message \['read'\]"),
    "no op": (b"{}", "unknown message None"),
    "no object": (b"[1, 2]", "unknown message None"),
    "no JSON": (b"\xff\x00hello", "no JSON"),
    "nothing": (b"", "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "an answer": (encode(Done()), "done: it is no request"),
    "push before open": (encode(Push(half=0)), "push: it comes before `open`"),
    "ask before open": (encode(Ask()), "ask: it comes before `open`"),
    "save before open": (encode(Save(half=0, run_url="file:///x", attempt=1)), "save: it comes before `open`"),
    "a missing field": (b'{"op": "push"}', "push: half is missing"),
    "a field of another type": (changed(READ, step="1"), "read: step: '1' is no int"),
    "a bool": (changed(READ, step=True), "read: step: True is no int"),
    "a float": (changed(READ, step=1.0), "read: step: 1.0 is no int"),
    "a third half": (changed(READ, half=2), "read: half: 2 is out of range"),
    "a negative offset": (changed(READ, offset=-4), "read: offset: -4 is out of range"),
    "a number beyond all": (changed(READ, step=1 << 70), "read: step: 1180591620717411303424 is out of range"),
    "a negative size": (changed(OPEN, shard=-16), "open: shard: -16 is out of range"),
    "a size beyond all memory": (changed(OPEN, shard=1 << 60), "no room for snapshots"),
    "a fragment too short": (changed(OPEN, fragments=[["weight", "w", 0, 4]]), "open: fragments: "),
    "a fragment outside": (changed(OPEN, fragments=[["weight", "w", 0, 4, 3]]), "a fragment is outside of the region"),
    "shapes that are none": (changed(OPEN, shapes={"w": "4"}), "open: shapes: '4' is no list"),
    "a buddy that is none": (changed(OPEN, buddy=["host", "port"]), "open: buddy: 'port' is no int"),
    "a snapshot without content": (encode(KEEP), "keep: 0 bytes are no snapshot"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_keeper_does_not_understand_it_refuses_by_name(peer, what):
    """And goes on with the next message of the same connection."""
    head, told = BAD[what]
    peer.send(head)
    with pytest.raises(RefusedError, match=told):
        answer(peer, Done)
    assert_serves(peer)


def test_bytes_that_nobody_expects_are_skipped(peer):
    peer.send(encode(READ), bytes(200_000))
    with pytest.raises(RefusedError, match="not here any more"):
        answer(peer, Done)
    assert_serves(peer)


def test_a_header_that_is_too_long_is_answered_before_it_has_come(peer):
    peer._sock.sendall(struct.pack("!IQ", MOST_HEAD + 1, 1 << 60))
    with pytest.raises(RefusedError, match="none of ours has more than"):
        answer(peer, Done)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (bytes(8), "8 bytes are no snapshot"),
        (bytes(8) + b"no notes", "Expecting value"),
        (bytes(8) + b"[]", "notes without counters"),
        (bytes(8) + b'{"counters": {}}', "notes without counters, rows, validation"),
        (bytes(8 + NOTES_BYTES + 1), "are no snapshot"),
    ],
)
def test_a_copy_that_is_no_snapshot_does_not_count(keeper, peer, content, told):
    """Its notes would be read by the driver, when it looks for what to go on from."""
    with pytest.raises(RefusedError, match=told):
        request(peer, KEEP, Done, content)
    assert [kept for kept in keeper.inventory(0) if kept.rank == KEEP.rank] == []
    assert_serves(peer)


def test_a_worker_gets_an_answer_to_everything(keeper, peer, tmp_path):
    region = Region.attach(request(peer, OPEN, Opened).path, RegionSize(16, 8))
    for wrong in (Push(half=0), Save(half=0, run_url=f"{tmp_path}", attempt=1)):
        with pytest.raises(RefusedError):  # Nothing is agreed yet.
            request(peer, wrong, Done)
    with pytest.raises(RefusedError, match="has a region of another size"):
        request(peer, decode(changed(OPEN, replicated=12)), Opened)
    region.seal(0, 5)
    region.agree(0, NOTES)
    request(peer, Push(half=0), Done)
    assert request(peer, Ask(), Idle).idle
    request(peer, Save(half=0, run_url=f"{tmp_path}", attempt=1), Done)
    (report,) = keeper.poll(30)
    assert isinstance(report, ShardWritten) and report.counters == {"step": 5}
    with pytest.raises(RefusedError, match="generation 2 is over; 3 is the one that counts"):
        keeper.inventory(3)
        request(peer, OPEN, Opened)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(knows=st.booleans(), data=st.binary(max_size=300))
def test_no_bytes_end_a_keeper(keeper, knows, data):
    """A stranger's, and those of one that knows the token."""
    address = keeper.address()
    with socket.create_connection((address.host, address.port), timeout=30) as sock:
        sock.sendall((address.token.encode() if knows else b"") + data)
        sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while sock.recv(1 << 16):
                pass
    connection = Connection.open(keeper.address())
    assert_serves(connection)
    connection.close()


def test_a_keeper_without_a_file_left_serves_again_once_it_has_one(keeper):
    """As many connections as a process may have files: `accept` fails, and must not be the last one."""
    address, (soft, hard) = ("127.0.0.1", keeper.address().port), resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = socket.socket()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (waiting.fileno() + 1, hard))
        waiting.connect(address)
        waiting.sendall(keeper.address().token.encode())
        waiting.settimeout(0.3)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    waiting.settimeout(30)
    waiting.sendall(struct.pack("!IQ", 2, 0) + b"{}")
    assert waiting.recv(1), "it was taken in after all"
    waiting.close()
