"""What one core takes in: a training step without its optimizer, for `bench data`.

Started as `python -m jobs.bench.data_eater MODEL_AS_JSON MICRO_BATCH SEQ_LEN`; it prints what came out as JSON.
"""

import json
import statistics
import sys
import time

import torch

from jobs.tell import tell
from workers.config import model_config_of
from workers.models import build
from workers.objective import batch_of, summed_loss

WARMUP, STEPS = 3, 12


def main(model_json: str, micro_batch: int, seq_len: int) -> None:
    """Time forward and backward of one slot on one thread."""
    torch.set_num_threads(1)
    config = model_config_of(json.loads(model_json))
    model, seconds = build(config), []
    batch = batch_of(torch.randint(0, config.vocab_size, (micro_batch, seq_len + 1)))
    for _ in range(WARMUP + STEPS):
        began = time.perf_counter()
        summed_loss(model(*batch.given), model.head, batch.targets).backward()
        seconds.append(time.perf_counter() - began)
    tell({"tokens_per_s": micro_batch * seq_len / statistics.median(seconds[WARMUP:])})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
