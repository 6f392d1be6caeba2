import io
import resource
from dataclasses import replace

import pytest

from jobs.doctor import checks, places
from jobs.doctor.command import asked_for, show
from jobs.doctor.findings import CLUSTER, Finding, exit_code, merged, stragglers
from jobs.doctor.node_probe import NodeProbe
from jobs.doctor.seen import ClockSeen, LinkSeen, Machine, NodeSeen, PlaceSeen, SlotSeen, TrackingSeen
from jobs.doctor.slots import ring_pairs
from jobs.doctor.tracking_probe import look_at_tracking
from jobs.screen import Screen
from orchestrator.config import ScalingConfig
from orchestrator.group.access import Access

GB = 10**9
NODE = NodeSeen(
    versions={"Python": "3.11.7", "torch": "2.13.0+cu128", "raymuon code": "aaaa"},
    cpus=8,
    memory=64 * GB,
    available=60 * GB,
    shm=32 * GB,
    max_files=65536,
    token_mode="token",
)
MACHINE = Machine(node="a", cpus=8.0, gpus=0.0, slots=2, object_store=16 * GB)


def wrong(findings, status="failure"):
    """The findings of a status, as (node, seen)."""
    assert all(finding.mend for finding in findings if finding.status != "ok"), "each says what to do"
    return [(finding.node, finding.seen) for finding in findings if finding.status == status]


def test_nodes_without_room():
    def check(room, asked=2, given=2):
        scaling = ScalingConfig(min_workers=2, max_workers=4)
        return checks.check_nodes([replace(MACHINE, slots=room)], scaling, False, asked, given)

    assert "room for 1 worker(s)" in wrong(check(1, 1, 1))[0][1]
    assert wrong(check(2)) == [] and "room for 2 worker(s)" in wrong(check(2), "warning")[0][1]
    assert wrong(check(4)) == wrong(check(4), "warning") == []
    assert "1 of 2 slot(s) are free" in wrong(check(4, 2, 1), "warning")[0][1]


def test_machines_that_differ():
    alike = {"a": NODE, "b": replace(NODE, memory=63 * GB)}
    assert checks.check_likeness(alike) == []
    for other in (replace(NODE, cpus=4), replace(NODE, memory=32 * GB), replace(NODE, gpus=("NVIDIA L4",))):
        ((node, seen),) = wrong(checks.check_likeness({**alike, "c": other}), "warning")
        assert node == CLUSTER and "a, b: 8 CPU" in seen and "c: " in seen


def test_versions_that_differ_from_the_drivers():
    driver = replace(NODE, versions={**NODE.versions, "torch": "2.13.0+cpu"})
    assert wrong(checks.check_versions({"a": NODE, "b": NODE}, driver, [])) == [], "a driver may have no GPU"
    older = replace(NODE, versions={**NODE.versions, "torch": "2.12.1+cu128", "raymuon code": "bbbb"})
    found = wrong(checks.check_versions({"a": NODE, "b": older}, driver, []))
    assert found == [
        ("b", "raymuon code bbbb; the driver has aaaa"),
        ("b", "torch 2.12.1+cu128; the driver has 2.13.0+cpu"),
    ]
    missing = replace(NODE, versions={"Python": "3.11.7", "raymuon code": "aaaa"})
    assert wrong(checks.check_versions({"a": missing}, driver, [])) == [("a", "torch none; the driver has 2.13.0+cpu")]


def test_cuda_nccl_and_drivers_that_differ():
    slots = [SlotSeen(node=node, tflops=1, device="H100", libraries={"NCCL": "2.27.5"}) for node in "aab"]
    slots[2] = replace(slots[2], libraries={"NCCL": "2.26.2"})
    assert wrong(checks.check_versions({"a": NODE}, NODE, slots)) == [("b", "NCCL 2.26.2; a has 2.27.5")]
    nodes = {name: replace(NODE, driver=driver) for name, driver in (("a", "570"), ("b", "550"), ("c", "570"))}
    assert wrong(checks.check_versions(nodes, NODE, slots[:2])) == [("b", "NVIDIA driver 550; a has 570")]


def test_memory():
    def check(seen=NODE, error=""):
        return checks.check_memory(MACHINE, seen, 40 * GB, 10 * GB, error)

    assert wrong(check()) == wrong(check(), "warning") == []
    assert "snapshots take 40 GB" in wrong(check(replace(NODE, available=39 * GB)))[0][1]
    assert "10 GB more" in wrong(check(replace(NODE, available=41 * GB)), "warning")[0][1]
    assert wrong(check(error="[Errno 27] File too large")) == [
        ("a", "memfd_create of 40 GB: [Errno 27] File too large")
    ]
    assert "/dev/shm has 67.1 MB" in wrong(check(replace(NODE, shm=64 << 20)), "warning")[0][1]
    assert "1,024 files" in wrong(check(replace(NODE, max_files=1024)), "warning")[0][1]


def test_a_memory_file_of_the_snapshots_size():
    probe = NodeProbe("")
    assert probe.try_memory(0) == probe.try_memory(40 * GB) == ""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (GB, limits[1]))
    try:
        assert "File too large" in probe.try_memory(40 * GB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_clocks():
    for offset, status in ((0.4, "ok"), (-1.5, "warning"), (6.0, "failure"), (-6.0, "failure")):
        (finding,) = checks.check_clock("a", ClockSeen(offset_s=offset, round_trip_s=0.002))
        assert finding.status == status


def test_a_dashboard_that_died_is_a_failure_and_none_at_all_is_not():
    url = "http://127.0.0.1:8265"
    assert {one.status for one in (*checks.check_dashboard("", ""), *checks.check_dashboard(url, ""))} == {"ok"}
    found = checks.check_dashboard(url, "Connection refused")
    assert "Connection refused: no job is taken" in wrong(found)[0][1] and exit_code(found) == 3


def test_who_may_give_the_cluster_commands():
    def access(loopback, asks, ours=None):
        return Access("http://x:8265", loopback, asks, ours, "2.60.0")

    nodes = {"a": NODE}
    assert "anybody runs code on all nodes" in wrong(checks.check_token(access(False, False), "", nodes))[0][1]
    assert wrong(checks.check_token(access(True, False), "", nodes)) == []
    assert wrong(checks.check_token(access(True, False), "", nodes), "warning")
    assert "not the head's own" in wrong(checks.check_token(access(False, True, False), "", nodes))[0][1]
    assert {one.status for one in checks.check_token(access(False, True, True), "", nodes)} == {"ok"}
    assert {one.status for one in checks.check_token(None, "", nodes)} == {"ok"}
    assert "no such file" in wrong(checks.check_token(None, "no such file", nodes), "warning")[0][1]
    lax = {"a": replace(NODE, token_mode="disabled", token_file="/home/x/.ray/auth_token")}
    found = wrong(checks.check_token(None, "", lax), "warning")
    assert len(found) == 2 and "ask for no token" in found[0][1] and "/home/x/.ray/auth_token" in found[1][1]


def test_a_slow_slot_and_a_slow_node_are_named():
    slots = [
        SlotSeen(node=node, tflops=rate, device="H100") for node, rate in zip("aabb", (10, 10, 6.9, 9), strict=True)
    ]
    assert wrong(checks.check_rates(slots), "warning") == [], "0.73 of the median"
    slots[2] = replace(slots[2], tflops=5.0)
    assert wrong(checks.check_rates(slots), "warning") == [("b (slot 2)", "5 TFLOP/s, 0.53 of the median")]

    def link(*members, rate):
        return LinkSeen(members=members, backend="nccl", latency_s=1e-5, bytes_per_s=rate)

    everyone = link(*"abcd", rate=4e9)
    pairs = [link("a", "b", rate=10e9), link("c", "d", rate=5e9), link("b", "c", rate=10e9), link("d", "a", rate=5e9)]
    assert [node for node, _ in wrong(checks.check_links(everyone, pairs), "warning")] == ["d"], "c has a good link"
    assert wrong(checks.check_links(None, []), "warning") == []


def test_stragglers_are_below_seven_tenths_of_the_median():
    assert stragglers({}) == {} and stragglers({"a": 1.0}) == {}
    assert stragglers({"a": 10.0, "b": 7.0, "c": 10.0}) == {}
    assert stragglers({"a": 10.0, "b": 6.0, "c": 10.0}) == {"b": 0.6}


@pytest.mark.parametrize("number", range(3, 9))
def test_each_node_meets_both_neighbours_and_one_at_a_time(number):
    nodes = [f"n{i}" for i in range(number)]
    rounds = ring_pairs(nodes)
    assert sorted(sorted(pair) for pairs in rounds for pair in pairs) == sorted(
        sorted((nodes[i], nodes[(i + 1) % number])) for i in range(number)
    )
    for pairs in rounds:
        meeting = [node for pair in pairs for node in pair]
        assert len(meeting) == len(set(meeting))


def test_storage_that_fails_on_one_node_is_lax_slow_or_late():
    good = PlaceSeen(write_bytes_per_s=1e8, read_bytes_per_s=2e8, skew_s=0.3)
    seen = {"a": good, "b": good, "driver": replace(good, read_bytes_per_s=1e6)}
    assert wrong(places.check_place("s3://x", seen)) == wrong(places.check_place("s3://x", seen), "warning") == []
    bad = {**seen, "b": PlaceSeen(error="s3://x: access denied (Forbidden); check the keys and the rights")}
    finding = next(one for one in places.check_place("s3://x", bad) if one.status == "failure")
    assert finding.node == "b" and "check the keys" in finding.seen
    assert "conditional creates" in wrong(places.check_place("x", {"a": replace(good, fences=False)}), "warning")[0][1]
    slow = {**seen, "c": replace(good, write_bytes_per_s=5e7)}
    assert wrong(places.check_place("x", slow), "warning") == [("c", "write: 50 MB/s, 0.50 of the median")]
    assert "+300.000 s against the store's" in wrong(places.check_place("x", {"a": replace(good, skew_s=-300.0)}))[0][1]


def test_a_folder_that_is_not_shared():
    found = places.check_shared("storage", "/data", ["a", "b"], {"a": ["a"], "b": ["a", "b"], "c": "no such mount"})
    assert wrong(found)[0][0] == "a" and "does not see what b wrote" in wrong(found)[0][1]
    assert wrong(found)[1] == ("c", "no such mount") and len(wrong(found)) == 2


def test_tracking_that_refuses_is_older_or_keeps_what_was_made():
    fine = TrackingSeen(uri="http://t", server="3.17.2", client="3.17.2")
    assert {one.status for one in places.check_tracking(fine)} == {"ok"}
    for status, told in ((401, "credentials are wrong"), (403, "has not the right"), (0, "boom")):
        seen = replace(fine, error="boom", status=status, doing="making a run")
        assert (
            told in wrong(places.check_tracking(seen))[0][1] and "making a run" in places.check_tracking(seen)[0].seen
        )
    assert "MLflow 2.9.0" in wrong(places.check_tracking(replace(fine, server="2.9.0")), "warning")[0][1]
    assert "run 7" in wrong(places.check_tracking(replace(fine, left="run 7")), "warning")[0][1]


def test_like_findings_become_one_and_the_exit_code_is_the_worst_places():
    ok = Finding("clock", "a", "ok", "fine")
    failed = Finding("versions", "b", "failure", "older", "update")
    both = merged([ok, failed, replace(ok, node="b")], nodes=2)
    assert both == [replace(ok, node=CLUSTER), failed]
    assert merged([ok, replace(ok, node="b")], nodes=3)[0].node == "a, b"
    lost = replace(failed, check="storage")
    assert [exit_code(found) for found in ([ok], [ok, lost], [lost, failed], [replace(lost, check="tracking")])] == [
        0,
        5,
        3,
        5,
    ]
    assert exit_code([replace(failed, status="warning")]) == 0


def test_without_a_config_only_what_is_named_is_looked_at():
    _, scope = asked_for(None, [], "", False)
    assert not (scope.storage or scope.data or scope.tracking) and scope.all_slots
    config, scope = asked_for("tracking.uri=http://t", ["scaling.max_workers=3"], "s3://x/y", True)
    assert scope.tracking and scope.storage and scope.calibrate and not scope.data and not scope.all_slots
    assert config.checkpoint.url == "s3://x/y" and config.tracking.uri == "http://t"
    config, scope = asked_for("demo", ["run.name=x"], "", False)
    assert scope.tracking and scope.storage and scope.data and not scope.all_slots and config.run.name == "x"


def test_the_table_has_every_finding_whole():
    console = Screen(width=60, record=True, file=io.StringIO())
    show([Finding("clock", "10.0.0.1", "failure", "[red] 9 s late", "set it")], console)
    text = console.export_text()
    assert "10.0.0.1" in text and "[red] 9 s late" in text and "-> set it" in text and "1 failure(s), 0 warn" in text


def test_a_folder_is_used_and_left_as_it_was(tmp_path):
    probe, url = NodeProbe(""), str(tmp_path / "new" / "checkpoints")
    seen = probe.use(url, ".doctor", "a")
    assert seen.error == "" and seen.fences and seen.write_bytes_per_s > 0 and seen.read_bytes_per_s > 0
    assert probe.marks(url, ".doctor") == ["a"]
    probe.tidy([url], ".doctor")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    probe, url = NodeProbe(""), str(tmp_path / "file" / "checkpoints")
    assert url in probe.use(url, ".doctor", "a").error and url in probe.mark(url, ".doctor", "a")
    probe.tidy([url], ".doctor")
    assert (tmp_path / "file").is_file()


def test_a_database_that_is_not_there_is_not_made(tmp_path):
    config, _ = asked_for("demo", [f"tracking.uri=sqlite:///{tmp_path}/runs/mlflow.db"], "", False)
    seen = look_at_tracking(config.tracking)
    assert seen.error == "" and "not there yet" in seen.note and list(tmp_path.iterdir()) == []
