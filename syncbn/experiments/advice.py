"""The study behind the advice: each run trains, and measures what the advice would have measured before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from syncbn.advise.alignment import gradient_alignment
from syncbn.advise.remedies import PROBES, SAMPLES, Remedy, recommended, synchronized
from syncbn.study import Setting
from syncbn.study.analysis.statistics import interval
from syncbn.train import train
from syncbn.train.config import ModelConfig, TaskConfig
from syncbn.train.launch import open_session, placement
from syncbn.train.logical_gpus import Partition
from syncbn.train.state import prepare


def run(setting: Setting) -> dict[str, float]:
    """The test ``error`` of a training with local statistics, and the ``alignment`` at its first weights.

    Where larger scores are better, the error is 1 minus the score. A diverged run has the error of guessing, 0.9. An
    alignment of -1 stands for a batch that a layer cannot normalize. The options ``data`` and ``model`` are those
    sections of a run.
    """
    given, options = setting.config, setting.options
    data = replace(given.data, **options["data"])
    config = replace(given, task=TaskConfig(), data=data, model=ModelConfig(**options["model"]))
    result = train(config)
    error = 0.9
    if result.status == "ok":
        error = 1 - result.score if result.metric.higher_is_better else result.score
    config = synchronized(config)
    with open_session(config, None) as accelerator:
        prepared = prepare(config, Partition.of(config, placement()), accelerator)
        size = setting.per_gpu_batch_size
        alignment = gradient_alignment(prepared, [size], SAMPLES, PROBES)[size]
    return {"error": error, "alignment": -1.0 if alignment is None else alignment}


@dataclass(frozen=True)
class Judged:
    """Advice beside what training gave, for one number of samples per GPU and one seed of the advice."""

    recommended: int
    """The recommended normalization batch size, the largest if none is recommended."""
    cheapest: int
    """The smallest size that is not shown to be worse than the best one."""
    safe: bool
    """Whether the recommended size is not shown to be worse than the best one."""

    @property
    def right(self) -> bool:
        return self.recommended == self.cheapest


def judge(errors: Mapping[int, Sequence[float]], alignment: Mapping[int, float]) -> Judged:
    """Compare the advice with trained errors.

    A size is worse than the best, which has the smallest mean error, if the 95 % interval (Student's t) of the
    difference over the seeds is above 0.

    Args:
        errors: by normalization batch size, from the local one to that of all GPUs, the error of each seed.
        alignment: by the same sizes; -1 for a batch that cannot be normalized.
    """
    sizes = sorted(errors)
    best = min(sizes, key=lambda size: float(np.mean(errors[size])))
    fine = [size for size in sizes if size == best or _low(errors[size], errors[best]) <= 0]
    remedies = [
        Remedy(gpus=size // sizes[0], normalization_batch_size=size, alignment=alignment[size], exchange_ms=0.0)
        for size in sizes
    ]
    found = recommended(remedies)
    size = sizes[-1] if found is None else found.normalization_batch_size
    return Judged(recommended=size, cheapest=fine[0], safe=size in fine)


def _low(errors: Sequence[float], others: Sequence[float]) -> float:
    """The lower end of the interval of the difference, paired by seed."""
    return interval(np.subtract(errors, others))[1]
