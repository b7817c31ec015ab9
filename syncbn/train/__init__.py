"""Training of one run: its task and configuration, the training itself, its result, a diagnosis of any model."""

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
