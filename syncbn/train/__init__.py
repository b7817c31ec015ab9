"""Training of one run: its configuration, the training itself, its result, and a diagnosis of the trained model."""

from syncbn.train.config import RunConfig, load_config
from syncbn.train.diagnosis import diagnose
from syncbn.train.loop import train
from syncbn.train.result import RunResult

__all__ = ["RunConfig", "RunResult", "diagnose", "load_config", "train"]
