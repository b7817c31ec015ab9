"""The training of one run: a function from a configuration to a result, on any number of processes."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from syncbn.population import reconcile
from syncbn.train.checkpoint import check_same, locked, save_checkpoint, save_weights
from syncbn.train.config import ConfigError, LocalError, RunConfig, config_to_dict, flatten, require
from syncbn.train.data.datasets import batch_loader
from syncbn.train.data.order import derive_seed
from syncbn.train.evaluate import evaluate, evaluate_statistics
from syncbn.train.launch import open_session, placement
from syncbn.train.logical_gpus import Partition
from syncbn.train.metrics import peak_memory, reset_peak_memory
from syncbn.train.norms.factory import clip_gradients
from syncbn.train.norms.moving_average import exchange_rows
from syncbn.train.result import RunResult, environment
from syncbn.train.state import FLUSH_STEPS, Run, prepare


def train(
    config: RunConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    progress: bool = False,
    trackers: Sequence[str] = (),
) -> RunResult:
    """Train one configuration, in this process or, under a launcher, in all of its processes together.

    Args:
        config: the run.
        out: folder for the configuration, metrics, checkpoints, weights and result; None writes nothing. All nodes have
            to see it.
        resume: continue from the last checkpoint in ``out``; a finished run returns its result.
        progress: show a progress bar (rank 0).
        trackers: names of accelerate's trackers, such as ``tensorboard``, which write below ``out``.

    Returns:
        The result, the same on every process. If a loss is not finite, the run ends there with status ``diverged``.

    Raises:
        ConfigError: the configuration cannot be run here, or ``out`` holds another run.
        LocalError: this process has an image that cannot be read, or a batch that a layer cannot normalize.

    Example:
        >>> from syncbn.train import load_config, train
        >>> data = {"data.name": "synthetic", "data.synthetic_samples": 64, "data.image_size": 8}
        >>> run = {"gpus": 4, "per_gpu_batch_size": 4, "norm.name": "sync", "budget.epochs": 1, "device": "cpu"}
        >>> config = load_config(None, {**data, **run, "model.width": 4})
        >>> result = train(config)
        >>> result.status, result.steps, result.samples
        ('ok', 4, 64)
    """
    partition = Partition.of(config, placement())
    first = partition.placement.rank == 0
    require(out is not None or not trackers, "out", None, "a folder, as trackers write to one")
    with locked(out) if out is not None and first else nullcontext():
        if out is not None and (done := _finished(config, out, resume)) is not None:
            return done
        with open_session(config, out, trackers) as accelerator:
            reset_peak_memory(accelerator.device)
            run = prepare(config, partition, accelerator, out, resume, progress)
            if trackers:
                values = flatten(config_to_dict(config))
                shown = {k: v if isinstance(v, int | float | str) else str(v) for k, v in values.items()}
                accelerator.init_trackers("trackers", config=shown)
            with run.bar or nullcontext():
                _train_epochs(run, out)
            result = _result(run)
            if out is not None and first:
                save_weights(run.model, out / "model.safetensors")
                result.to_json(out / "result.json")
            accelerator.wait_for_everyone()
    return result


def _finished(config: RunConfig, out: Path, resume: bool) -> RunResult | None:
    """The result of a finished run in ``out``; None if there is none, or if it is damaged."""
    path = out / "result.json"
    unfinished = (out / "checkpoint").exists() and not path.exists()
    require(resume or not unfinished, "out", str(out), "an empty folder, or --resume to continue the run in it")
    require(resume or not path.exists(), "out", str(out), "an empty folder, or --resume; it holds a finished run")
    if not path.exists():
        return None
    try:
        result = RunResult.from_json(path)
    except (ValueError, TypeError):
        return None
    check_same(result.config, config_to_dict(config), out)
    return result


def _train_epochs(run: Run, out: Path | None) -> None:
    budget = run.config.budget
    while run.progress.epoch < run.schedule.epochs:
        _train_epoch(run)
        run.progress.epoch += 1
        if run.progress.diverged:
            return
        reconcile(run.model)
        exchange_rows(run.model)
        epoch, last = run.progress.epoch, run.progress.epoch == run.schedule.epochs
        if last or epoch % budget.eval_every == 0:
            _evaluate(run)
        if out is not None and not last and budget.checkpoint_every and epoch % budget.checkpoint_every == 0:
            _checkpoint(run, out)


def _train_epoch(run: Run) -> None:
    steps = list(run.schedule.steps(run.progress.epoch))
    local = [run.local(batch) for step in steps for batch in step]
    images = batch_loader(run.data.train, local, run.config.data.workers)
    run.wrapped.train()
    started = time.perf_counter()
    for step in steps:
        # Dropout is seeded by the step, so that a resumed run draws the same numbers.
        torch.manual_seed(derive_seed("step", run.config.seed, run.progress.step, run.partition.placement.rank))
        _freeze_when_due(run)
        loss = torch.zeros((), dtype=torch.float64, device=run.device)
        samples = sum(map(len, step))
        for batch in step:
            run.tell_groups(len(batch))
            x, y = _fetch(images)
            loss += _forward_backward(run, x, y, samples, last=batch is step[-1])
        if run.config.norm.name == "nf":
            run.accelerator.unscale_gradients()
            clip_gradients(run.model, run.config.norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
        run.progress.step += 1
        run.progress.samples += samples
        run.pending.append(loss)
        if len(run.pending) == FLUSH_STEPS or step is steps[-1]:
            _flush(run)
            if run.progress.diverged:
                break
    run.progress.seconds += time.perf_counter() - started


def _freeze_when_due(run: Run) -> None:
    """`frozen`: from its step on, the layers use their running statistics, which are the same on all processes."""
    norm, training = run.config.norm, [layer for layer in run.norms if layer.training]
    if norm.name == "frozen" and training and run.progress.step >= int(norm.freeze_at * run.schedule.total_steps):
        reconcile(run.model)
        for layer in training:
            layer.eval()


def _forward_backward(run: Run, x: Tensor, y: Tensor, samples: int, last: bool) -> Tensor:
    """Add the gradients of a batch; returns this process's share of the mean loss over the step's ``samples``."""
    x, y = x.to(run.device, run.dtype, non_blocking=True), y.to(run.device, non_blocking=True)
    processes = run.partition.placement.processes
    # Processes exchange gradients once per optimizer step, with its last batch.
    with nullcontext() if last else run.accelerator.no_sync(run.wrapped):
        try:
            logits = run.wrapped(x)
        except ValueError as error:
            # For example a last batch that gives one logical GPU a single 1x1 map, which has no variance.
            got = f"per_gpu_batch_size: got {run.config.per_gpu_batch_size}"
            raise LocalError(f"{got}, expected batches that every layer can normalize: {error}") from error
        # Summed over this process, divided by the samples of all: any split of the samples gives the same loss.
        total = F.cross_entropy(logits, y, reduction="sum", label_smoothing=run.config.optimizer.label_smoothing)
        loss = total / samples
        overlap = run.config.norm.name == "renorm" and len(run.partition.ranks) < processes
        if overlap:
            run.shared.start()
        # DDP averages gradients over the processes, but the loss is a sum over them.
        run.accelerator.backward(loss * processes)
        if overlap:
            run.shared.finish()
    return loss.detach().to(torch.float64)


def _fetch(images: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    try:
        return next(images)
    except (ConfigError, RuntimeError) as error:
        # The DataLoader passes on a loader process's error as a RuntimeError whose text ends with the message.
        found = re.search(r"ConfigError: (.+)", f"{type(error).__name__}: {error}")
        if found is None:
            raise
        raise LocalError(found[1]) from error


def _flush(run: Run) -> None:
    """Sum the pending losses over the processes, fetch them and record them."""
    losses = torch.stack(run.pending)
    run.pending.clear()
    if run.partition.placement.processes > 1:
        dist.all_reduce(losses)
    values: list[float] = losses.tolist()
    done, lr = run.progress, run.scheduler.get_last_lr()[0]
    done.losses += values
    records = [
        {"kind": "step", "step": step, "epoch": done.epoch, "train_loss": value}
        for step, value in enumerate(values, start=done.step - len(values) + 1)
    ]
    records[-1]["lr"] = lr
    run.metrics.write(records)
    run.accelerator.log({"train_loss": values[-1], "lr": lr}, step=done.step)
    if run.bar is not None:
        description = f"epoch {done.epoch + 1}/{run.schedule.epochs}  loss {values[-1]:.3f}"
        run.bar.update(run.bar.task_ids[0], completed=done.step, description=description)


def _evaluate(run: Run) -> None:
    error, loss, count = evaluate(run)
    done, found = run.progress, {"test_error": error, "test_loss": loss}
    recent = done.losses[-run.schedule.steps_per_epoch :]
    entry = {"epoch": done.epoch, "step": done.step, "train_loss": sum(recent) / len(recent), **found}
    done.history.append(entry)
    run.metrics.write([{"kind": "eval", **entry, "test_images": count}])
    run.accelerator.log(found, step=done.step)


def _checkpoint(run: Run, out: Path) -> None:
    if run.partition.placement.rank == 0:
        state = {"optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict()}
        state["scaler"] = None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict()
        state["progress"] = vars(run.progress)
        save_checkpoint(out / "checkpoint", run.progress.step, run.model, state, run.config)
    run.accelerator.wait_for_everyone()


def _result(run: Run) -> RunResult:
    done = run.progress
    # Each training loss is computed before its step, so only the evaluation shows what the last step did.
    diverged = done.diverged or not math.isfinite(done.history[-1]["test_loss"])
    final = {} if diverged else done.history[-1]
    evaluations, layers = ([], []) if diverged else evaluate_statistics(run, final)
    return RunResult(
        status="diverged" if diverged else "ok",
        test_error=final.get("test_error"),
        test_loss=final.get("test_loss"),
        steps=done.step,
        samples=done.samples,
        seconds=done.seconds,
        images_per_second=done.samples / max(done.seconds, 1e-9),
        parameters=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        losses=done.losses,
        history=done.history,
        evaluations=evaluations,
        layers=[asdict(layer) for layer in layers],
        peak_memory_bytes=peak_memory(run.device),
        train_images=len(run.data.train),
        test_images=len(run.data.test),
        processes=run.partition.placement.processes,
        environment=environment(run.device),
        config=config_to_dict(run.config),
    )
