"""The worker's side of the conversation: one JSON request a line on stdin, one reply a line on stdout.

Standard library only: it runs in environments that have neither torch nor this repository on their path.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import time


def serve(load, prepare, save, peak=None):
    """Answer until stdin ends.

    ``load()`` → what ``prepare`` needs; ``prepare(loaded, request)`` → a function of no arguments that computes and
    waits; ``save(result, path)`` writes what it returned; ``peak(run)`` measures memory (default: :func:`peak_bytes`).
    Requests: ``{"do": "prepare", …}``, ``{"do": "run", "calls": k}`` → seconds per call, ``{"do": "result", "path": …}``,
    ``{"do": "memory"}`` → bytes. Replies: ``{"ok": …}`` or ``{"error": text}``.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)
    limit_cores(parser.parse_args().threads)
    # The replies keep the real stdout; whatever the libraries print goes to stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    loaded, run = load(), None
    print(json.dumps({"ok": "ready"}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                run = prepare(loaded, request)
                answer = True
            elif request["do"] == "run":
                answer = seconds_per_call(run, request["calls"])
            elif request["do"] == "result":
                answer = save(run(), request["path"])
            elif request["do"] == "memory":
                answer = (peak or peak_bytes)(run)
            else:
                raise ValueError(f"unknown request {request['do']!r}; write prepare, run, result or memory")
            reply = {"ok": answer}
        except Exception as error:  # whoever asked decides what a failure means
            lines = str(error).strip().splitlines() or [""]
            reply = {"error": f"{type(error).__name__}: {lines[0][:200]}"}
        print(json.dumps(reply), file=replies)


def limit_cores(threads):
    """Use the first ``threads`` of the cores that this process has: XLA sizes its thread pool by them when it loads."""
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def seconds_per_call(run, calls):
    """The mean over ``calls`` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def peak_bytes(run):
    """The highest resident memory during one call, above what was resident before it (Linux with glibc).

    From here on the process returns freed memory at once, which makes it slower: time it before.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    # glibc keeps freed blocks below a threshold that grows with use: a call would find its memory already resident.
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(option, 65536)
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # VmHWM := VmRSS
    before = status_bytes("VmRSS")
    result = run()
    peak = status_bytes("VmHWM") - before
    del result
    return peak


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def status_bytes(field):
    """One memory field of /proc/self/status in bytes.

    >>> status_bytes("VmHWM") >= status_bytes("VmRSS") > 0
    True
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
