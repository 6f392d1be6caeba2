"""Data: how fast text becomes tokens, against the `tokenizers` library, and how fast tokens reach a worker.

The text is Python source of the packages that are installed here, the tokenizer a byte-level BPE that is trained on the
first part of it. Everything is per core: one thread each, in turns.

- `tokenize_ratio_to_hf`: a shard is made by `raymuon prepare`'s own function (read, split, encoded, checked, hashed and
  written), against a loop that only calls `encode_batch` on the same texts in memory.
- `tokenize_scaling_2`: the same by Ray tasks on two nodes of one processor, against one node.
- `loader_ratio_disk`, `loader_ratio_s3`: tokens per second of a process that reads shuffled samples, from a disk and
  from a SeaweedFS through an empty cache, against what one core takes in a training step of the demo's model without
  its optimizer.
- `first_batch_s_0`, `first_batch_s_1e9`: from nothing to the first batch, at that sample of a run.
- `wait_share_slow_store`: what a reader at the pace of a core waits, with a window, where the store gives 20 MB/s;
  `late_wait_share_slow_store`: of it what comes after the first tenth.
- `memory_growth`: memory of a reader whose cache is a tenth of its corpus, at its end by that after a tenth.
"""

import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.bench.cluster import bench_cluster
from jobs.bench.process import python, run_json
from jobs.bench.throttle import throttled
from jobs.load import load
from jobs.screen import Screen
from jobs.stack.seaweed import BUCKET, s3_environment, seaweedfs
from jobs.tokenizer import train_tokenizer
from orchestrator.config import RunConfig
from orchestrator.stop import StopSignal
from workers.common.errors import ConfigError
from workers.common.storage import Store
from workers.data.config import DataConfig, SourceConfig
from workers.data.corpus import Corpus
from workers.data.documents import documents
from workers.data.prepare import Group, Work, make_group, prepare, works_of

TEXT_BYTES = 112 << 20
CHUNK_BYTES = 16 << 20
"""Of a file: a round of the comparison encodes one."""
COPIES = 10
"""Of all files, by other names, for the tasks: at this speed a hundred megabytes are gone before both have begun."""
RIVAL_BATCH = 1 << 20
DISK_SLOTS, S3_SLOTS, MEMORY_SLOTS = 4000, 1500, 600
SLOW_BYTES_PER_S, SLOW_WINDOW, SLOW_SLOTS = 20e6, 8192, 150


def data(overrides: list[str], rounds: int, vocab: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Measure all of it in one call.

    Args:
        overrides: of the demo's config, whose model is fed.
        rounds: of each comparison.
        vocab: tokens of the tokenizer.
        say: takes a line about each measurement.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Per core.
    config = load("demo", overrides)
    with tempfile.TemporaryDirectory(prefix="raymuon-bench-data-") as folder:
        texts = _write_texts(Path(folder))
        size = sum(path.stat().st_size for path in texts)
        tokenizer = f"{folder}/tokenizer"
        train_tokenizer(str(texts[0]), vocab, tokenizer, "text", 0, Screen(quiet=True))
        say(f"{size / 1e6:,.1f} MB of text in {len(texts)} files; a tokenizer of {vocab:,}")
        sources = tuple(SourceConfig(name=path.stem, urls=(str(path),)) for path in texts)
        chunks = DataConfig(sources=sources, tokenizer=tokenizer, prepared_url=f"{folder}/chunks")
        whole = DataConfig(source=f"{folder}/texts", tokenizer=tokenizer, prepared_url=f"{folder}/whole")
        result: dict[str, Any] = {"text_mb": size / 1e6, "vocab": vocab}
        result |= _against_tokenizers(works_of(chunks), rounds, say)
        result |= _scaling(whole, folder, rounds, say)
        (corpus,) = prepare(whole)
        result |= _reading(config, corpus, folder, rounds, say)
    return result


def _write_texts(folder: Path) -> list[Path]:
    """Write the installed packages' source as JSONL, in files of CHUNK_BYTES."""
    (folder / "texts").mkdir()
    paths: list[Path] = []
    lines, held, total = [], 0, 0
    for file in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not text.strip() or "\0" in text:
            continue
        lines.append(json.dumps({"text": text}) + "\n")
        held += len(lines[-1])
        if held >= CHUNK_BYTES:
            paths.append(folder / "texts" / f"{len(paths):02d}.jsonl")
            paths[-1].write_text("".join(lines))
            lines, held, total = [], 0, total + held
        if total >= TEXT_BYTES:
            return paths
    raise ConfigError(
        f"only {total / 1e6:.0f} MB of Python source are installed here, {TEXT_BYTES / 1e6:.0f} are needed"
    )


def _against_tokenizers(works: list[Work], rounds: int, say: Callable[[str], object]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    rival = Tokenizer.from_str(works[0].tokenizer.files["tokenizer.json"])
    make_group(works[-1], works[-1].groups[0])  # Loads both.
    ratios, speeds, engines = [], {"raymuon": [], "tokenizers": []}, set()
    for number in range(rounds):
        work = works[number % (len(works) - 1)]
        texts = [one.text.decode() for piece in work.groups[0].pieces for one in documents(piece, "text", _refuse)]
        size = sum(len(text.encode()) for text in texts)

        def ours(work: Work = work, size: int = size) -> None:
            began = time.perf_counter()
            engines.add(make_group(work, work.groups[0])["engine"])
            speeds["raymuon"].append(size / 1e6 / (time.perf_counter() - began))

        def theirs(texts: list[str] = texts, size: int = size) -> None:
            began, batch, held = time.perf_counter(), [], 0
            for text in texts:
                batch.append(text)
                held += len(text)
                if held >= RIVAL_BATCH:
                    rival.encode_batch(batch, add_special_tokens=False)
                    batch, held = [], 0
            rival.encode_batch(batch, add_special_tokens=False)
            speeds["tokenizers"].append(size / 1e6 / (time.perf_counter() - began))

        for arm in (ours, theirs)[:: -1 if number % 2 else 1]:
            arm()
        ratios.append(speeds["raymuon"][-1] / speeds["tokenizers"][-1])
        say(f"round {number + 1}: {speeds['raymuon'][-1]:.1f} MB/s, tokenizers {speeds['tokenizers'][-1]:.1f} MB/s")
    return {
        "tokenize_ratio_to_hf": statistics.median(ratios),
        "tokenize_ratios": ratios,
        "tokenize_mb_per_s": {arm: statistics.median(found) for arm, found in speeds.items()},
        "engines": sorted(engines),
    }


def _refuse(told: str) -> None:
    raise ConfigError(told)


def _scaling(config: DataConfig, folder: str, rounds: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Return the speed of two tasks at a time by that of one: between the first finished groups and the last ones."""
    from orchestrator.preparation import prepare_on

    many = Path(folder, "many")
    many.mkdir()
    for number in range(COPIES):
        for path in Path(config.source).iterdir():
            (many / f"{number}-{path.name}").hardlink_to(path)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for nodes in (1, 2) if number % 2 else (2, 1):
            done: list[tuple[float, int]] = []

            def told(work: Work, group: Group, note: dict[str, Any], done: list[tuple[float, int]] = done) -> None:
                done.append((time.monotonic(), group.size))

            with tempfile.TemporaryDirectory(dir=folder) as to, bench_cluster(nodes) as cluster:
                wanted = DataConfig(source=str(many), tokenizer=config.tokenizer, prepared_url=to)
                prepare_on(works_of(wanted), cluster.address, StopSignal(), told)
            first, last = nodes, len(done) - nodes + 1  # While all are busy, and have the tokenizer.
            size = sum(size for _, size in done[first:last])
            speeds[nodes].append(size / 1e6 / (done[last - 1][0] - done[first - 1][0]))
            say(f"{nodes} task(s) at a time: {speeds[nodes][-1]:.1f} MB/s")
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    return {
        "tokenize_scaling_2": statistics.median(ratios),
        "scaling_ratios": ratios,
        "tasks_mb_per_s": {nodes: statistics.median(found) for nodes, found in speeds.items()},
    }


def _reading(
    config: RunConfig, corpus: Corpus, folder: str, rounds: int, say: Callable[[str], object]
) -> dict[str, Any]:
    eaten, disk, bucket, firsts = [], [], [], {0: [], 10**9: []}
    os.environ.update(s3_environment())
    Path(folder, "s3").mkdir()
    with seaweedfs(Path(folder, "s3")) as endpoint:
        store = Store(f"s3://{BUCKET}/tokens", endpoint)
        store.fs.put(corpus.url, store.path(), recursive=True)
        remote = replace(corpus, url=store.url, s3_endpoint=endpoint)
        for number in range(rounds):
            eaten.append(run_json(python("jobs.bench.data_eater", json.dumps(asdict(config.model)), *_size(config))))
            disk.append(_read(config, corpus, DISK_SLOTS, folder=folder))
            bucket.append(_read(config, remote, S3_SLOTS, folder=folder))
            for first, found in firsts.items():
                found.append(_read(config, corpus, 1, first, folder=folder)["first_batch_s"])
            told = [f"{found[-1]['tokens_per_s']:,.0f}" for found in (eaten, disk, bucket)]
            say(f"round {number + 1}: a core eats {told[0]} tokens/s; from disk {told[1]}, from S3 {told[2]}")
        with throttled(int(endpoint.rpartition(":")[2]), SLOW_BYTES_PER_S) as port:
            slow = replace(remote, s3_endpoint=f"http://127.0.0.1:{port}")
            pace = statistics.median(one["tokens_per_s"] for one in eaten)
            paced = _read(config, slow, SLOW_SLOTS, folder=folder, window=SLOW_WINDOW, pace=pace)
        bytes_of = Corpus.tokens(corpus.train) * 2
        small = _read(config, remote, MEMORY_SLOTS, folder=folder, cache_gb=bytes_of / 1e10)
    rates = [[one["tokens_per_s"] for one in found] for found in (eaten, disk, bucket)]
    by_round = list(zip(*rates, strict=True))
    return {
        "loader_ratio_disk": statistics.median(disk / eats for eats, disk, _ in by_round),
        "loader_ratio_s3": statistics.median(s3 / eats for eats, _, s3 in by_round),
        "loader_wait_share_s3": statistics.median(one["wait_s"] / one["seconds"] for one in bucket),
        "tokens_per_s": dict(zip(("eaten", "disk", "s3"), map(statistics.median, rates), strict=True)),
        "first_batch_s_0": statistics.median(firsts[0]),
        "first_batch_s_1e9": statistics.median(firsts[10**9]),
        "wait_share_slow_store": paced["wait_s"] / paced["seconds"],
        "late_wait_share_slow_store": paced["late_wait_s"] / paced["seconds"],
        "memory_growth": small["rss_last"] / small["rss_tenth"],
        "memory_mb": [small["rss_tenth"] / 1e6, small["rss_last"] / 1e6],
        "read_over_cache": small["bytes_read"] / (bytes_of / 10),
    }


def _size(config: RunConfig) -> tuple[str, str]:
    return str(config.train.micro_batch), str(config.train.seq_len)


def _read(
    config: RunConfig,
    corpus: Corpus,
    slots: int,
    first: int = 0,
    window: int = 0,
    folder: str = "",
    cache_gb: float = 10.0,
    pace: float = 0.0,
) -> dict[str, Any]:
    """Read so many slots in a new process, with a cache of its own that is empty."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        arguments = [corpus.url, corpus.s3_endpoint, *_size(config), *map(str, (slots, first, window, cache_gb, pace))]
        return run_json(python("jobs.bench.data_reader", *arguments), TMPDIR=cache)
