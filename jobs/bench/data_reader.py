"""One reader of `bench data`: shuffled samples in slots, a slot ahead, as a worker reads them.

Started as `python -m jobs.bench.data_reader URL S3_ENDPOINT MICRO_BATCH SEQ_LEN SLOTS FIRST WINDOW CACHE_GB PACE`; it
prints what came out as JSON. With a pace, in tokens per second, it computes nothing between two slots for as long.
"""

import sys
import time

import numpy as np
import psutil

from jobs.tell import tell
from workers.common.storage import Store
from workers.data.corpus import load
from workers.data.order import Order
from workers.data.tokens import TokenSplit


def main(
    url: str,
    endpoint: str,
    micro_batch: int,
    seq_len: int,
    slots: int,
    first: int,
    window: int,
    cache_gb: float,
    pace: float,
) -> None:
    """Read `slots` slots of `micro_batch` samples, from the global sample `first` on."""
    corpus, process = load(Store(url, endpoint)), psutil.Process()
    began = time.perf_counter()
    tokens = TokenSplit(corpus, corpus.train, seq_len, cache_gb)
    order = Order(1, [("", tokens.num_samples)], [(0, (1,))], window)

    def samples(slot: int) -> np.ndarray:
        return order.at(first + np.arange(slot * micro_batch, (slot + 1) * micro_batch)).sample

    tokens.batch(samples(0))
    first_batch_s = time.perf_counter() - began
    began, now, tenth, early_s = time.perf_counter(), samples(0), process.memory_info().rss, 0.0
    for slot in range(1, slots):
        ahead = samples(slot)
        tokens.prefetch(ahead)
        tokens.batch(now)
        now = ahead
        if slot == slots // 10:
            tenth, early_s = process.memory_info().rss, tokens.wait_s
        if pace:
            time.sleep(micro_batch * seq_len / pace)
    seconds = time.perf_counter() - began
    tell(
        {
            "first_batch_s": first_batch_s,
            "seconds": seconds,
            "tokens_per_s": (slots - 1) * micro_batch * seq_len / seconds,
            "wait_s": tokens.wait_s,
            "late_wait_s": tokens.wait_s - early_s,
            "rss_tenth": tenth,
            "rss_last": process.memory_info().rss,
            "bytes_read": tokens.bytes_read,
        }
    )
    tokens.close()


if __name__ == "__main__":
    url, endpoint, *numbers, cache_gb, pace = sys.argv[1:]
    micro_batch, seq_len, slots, first, window = map(int, numbers)
    main(url, endpoint, micro_batch, seq_len, slots, first, window, float(cache_gb), float(pace))
