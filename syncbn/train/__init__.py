"""Training of one run: its task and configuration, the training itself, its result, a diagnosis of any model."""

from typing import TYPE_CHECKING

from syncbn.lazy import import_when_used

if TYPE_CHECKING:
    from syncbn.train.config import RunConfig, load_config
    from syncbn.train.diagnosis import diagnose
    from syncbn.train.loop import train
    from syncbn.train.model_diagnosis import diagnose_model
    from syncbn.train.result import Metric, RunResult
    from syncbn.train.stopping import Stopped
    from syncbn.train.task import Datasets, Sum, Task

# fmt: off
__all__ = [
    "Datasets", "Metric", "RunConfig", "RunResult", "Stopped", "Sum", "Task", "diagnose", "diagnose_model",
    "load_config", "train",
]
# fmt: on

import_when_used(
    __name__,
    {
        "config": ("RunConfig", "load_config"),
        "diagnosis": ("diagnose",),
        "loop": ("train",),
        "model_diagnosis": ("diagnose_model",),
        "result": ("Metric", "RunResult"),
        "stopping": ("Stopped",),
        "task": ("Datasets", "Sum", "Task"),
    },
)
