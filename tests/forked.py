"""Processes that are forked from a server which has imported what takes long, so that one starts in a moment."""

import multiprocessing
import os

from jobs.stack.seaweed import s3_environment

OURS = ["workers.training", "orchestrator.group.keeper", "orchestrator.record.tracking"]
TESTS = ["tests.ranks", "tests.processes", "tests.faults", "tests.frozen"]

os.environ.update(s3_environment())  # Before the server starts, from which all processes inherit.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "deepspeed", *OURS, *TESTS])
