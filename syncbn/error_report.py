"""The sentence with which a process ends, where its user finds it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time


def report_error(sentence: str, speaks: bool = True) -> None:
    """Print ``sentence`` to stderr if this process ``speaks``; let torchrun's summary, which comes last, show it too.

    torchrun reads the file that its environment variable names, in the format of
    ``torch.distributed.elastic.multiprocessing.errors``. The handler there writes tracebacks alone.
    """
    if speaks:
        with contextlib.suppress(Exception):  # there may be no one left to read it
            print(f"syncbn: error: {sentence}", file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        details = {"py_callstack": f"syncbn: error: {sentence}", "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(file, "w") as opened:
            json.dump({"message": {"message": sentence, "extraInfo": details}}, opened)
