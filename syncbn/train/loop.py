"""The training of one run: a function from a configuration to a result, on any number of processes."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.accumulation import accumulate_statistics
from syncbn.population import reconcile, restored
from syncbn.train.batches import fetched, forward, loss_of
from syncbn.train.checkpoint import check_same, locked, save_checkpoint, save_weights
from syncbn.train.config import ConfigError, RunConfig, config_to_dict, require
from syncbn.train.data.order import derive_seed
from syncbn.train.data.samples import Key, batch_loader
from syncbn.train.evaluate import evaluate, evaluate_statistics
from syncbn.train.launch import open_session, placement
from syncbn.train.logical_gpus import Partition
from syncbn.train.metrics import evaluation_record, peak_memory, reset_peak_memory
from syncbn.train.norms.factory import clip_gradients
from syncbn.train.norms.moving_average import exchange_rows
from syncbn.train.own_buffers import differing_buffers
from syncbn.train.pauses import FLUSH_STEPS, pause, pauses_now
from syncbn.train.result import RunResult, environment
from syncbn.train.selection import best_entry, check_selection, note_evaluation, restore_best, stops_early
from syncbn.train.state import Run, prepare
from syncbn.train.stopping import Stopped, noting
from syncbn.train.stored import IncompleteFile
from syncbn.train.task import Task
from syncbn.train.tasks.named import BUILT_IN_NAMES, traceback_in
from syncbn.train.tasks.source import digest_of
from syncbn.train.trackers import begin_tracking, track


def train(
    config: RunConfig,
    out: Path | None = None,
    *,
    task: Task | None = None,
    resume: bool = False,
    progress: bool = False,
    trackers: Sequence[str] = (),
    stop_on: Sequence[signal.Signals] = (),
) -> RunResult:
    """Train one configuration, in this process or, under a launcher, in all of its processes together.

    Args:
        config: the run.
        out: folder for the configuration, metrics, checkpoints, weights and result; None writes nothing. All nodes have
            to see it.
        task: what is trained, in place of the task that the configuration names.
        resume: continue from the last checkpoint in ``out``; a finished run returns its result.
        progress: show a progress bar (rank 0).
        trackers: accelerate's trackers whose packages are installed; ``tensorboard`` and ``wandb`` write below ``out``.
        stop_on: signals, such as ``signal.SIGTERM``, at which all processes write a checkpoint and raise ``Stopped``.

    Returns:
        The result, the same on every process. If a loss is not finite, the run ends there with status ``diverged``.

    Raises:
        ConfigError: the configuration cannot be run here, or ``out`` holds another run.
        LocalError: this process has an image that cannot be read, a batch that a layer cannot normalize, or a task
            whose code raised an error.
        Stopped: a signal of ``stop_on`` came before the last step.

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
    log = None if out is None else out / f"error-{partition.placement.rank}.log"
    with locked(out) if out is not None and first else nullcontext(), traceback_in(log):
        name = config.task.name if task is None else type(task).__name__
        if out is not None and (done := _finished(config, name, out, resume)) is not None:
            return done
        with open_session(config, out, trackers) as accelerator:
            reset_peak_memory(accelerator.device)
            run = prepare(config, partition, accelerator, out, resume=resume, progress=progress, given=task)
            begin_tracking(accelerator, config, out)
            check_selection(run)
            # Before this a signal ends the process, even one that waits for others: nothing is lost.
            with noting(stop_on) as run.noted:
                result = _train_to_the_end(run, out)
    if result is None:
        raise Stopped(run.progress.step, run.noted.cause, None if out is None else out / "checkpoint")
    return result


def _train_to_the_end(run: Run, out: Path | None) -> RunResult | None:
    """The result; None if a signal has stopped the run."""
    with run.bar or nullcontext():
        if _train_epochs(run, out):
            return None
    restore_best(run)
    result = _result(run)
    if out is not None and run.partition.placement.rank == 0:
        save_weights(run.model, out / "model.safetensors")
        result.to_json(out / "result.json")
    run.accelerator.wait_for_everyone()
    return result


def _finished(config: RunConfig, task: str, out: Path, resume: bool) -> RunResult | None:
    """The result of a finished run in ``out``; None if there is none, or if it was not written to its end."""
    path = out / "result.json"
    unfinished = (out / "checkpoint").exists() and not path.exists()
    require(resume or not unfinished, "out", out, "an empty folder, or --resume to continue the run in it")
    require(resume or not path.exists(), "out", out, "an empty folder, or --resume; it holds a finished run")
    if not path.exists():
        return None
    try:
        result = RunResult.from_json(path)
    except IncompleteFile:
        return None
    expected = f"{result.task}, the task of the run in {out}; use another --out"
    require(result.task == task, "task", task, expected)
    check_same(result.config, config_to_dict(config), out)
    return result


def _train_epochs(run: Run, out: Path | None) -> bool:
    """Train to the end, or until a signal stops the run; returns whether one did."""
    budget = run.config.budget
    if run.progress.step > 0:
        _settle_gradient_buckets(run)
    while run.progress.epoch < run.schedule.epochs:
        if _train_epoch(run, out):
            return True
        run.progress.epoch += 1
        if run.progress.diverged:
            return False
        reconcile(run.model)
        exchange_rows(run.model)
        epoch, last = run.progress.epoch, run.progress.epoch == run.schedule.epochs
        if last or epoch % budget.eval_every == 0:
            _evaluate(run)
            note_evaluation(run)
            last = last or stops_early(run)
        if not last and budget.checkpoint_every and epoch % budget.checkpoint_every == 0:
            _checkpoint(run, out)
        if last:
            return False
    return False


def _settle_gradient_buckets(run: Run) -> None:
    """Let DDP arrange its buckets before a resumed run's first step as the whole run had them there.

    DDP arranges them anew after its first backward pass, by the order in which gradients were ready. How a sum over
    three processes or more is rounded depends on a gradient's place. So a backward pass is made and thrown away.
    """
    if run.partition.placement.processes <= 2:  # a sum of two does not depend on their order
        return
    run.wrapped.train()
    batch = next(run.schedule.steps(run.progress.epoch))[0]
    with restored(run.model.buffers()):
        run.tell_groups(len(batch))
        inputs, targets = next(fetched(run, batch_loader(run.data.train, [run.local(batch)], workers=0)))
        _forward_backward(run, inputs, targets, [batch], last=True)
    run.optimizer.zero_grad()


def _train_epoch(run: Run, out: Path | None) -> bool:
    """Train an epoch from where the run is in it; returns whether a signal stops the run here."""
    steps = list(run.schedule.steps(run.progress.epoch))
    done = run.progress.step - run.progress.epoch * run.schedule.steps_per_epoch
    local = [run.local(batch) for step in steps[done:] for batch in step]
    loaded = fetched(run, batch_loader(run.data.train, local, run.config.data.workers))
    run.wrapped.train()
    run.pace.start()
    for number, step in enumerate(steps[done:], start=done + 1):
        _train_step(run, step, loaded)
        judged = number % FLUSH_STEPS == 0 or number == len(steps)
        if not (judged or pauses_now(run)):
            continue
        due = pause(run)
        if judged:
            values = {"train_loss": run.progress.losses[-1], "lr": run.lr(run.progress.step - 1)}
            track(run.accelerator, values, run.progress.step)
            if run.progress.diverged:
                return False
        if due.checkpoint or due.stop:
            _checkpoint(run, out)
        if due.stop:
            return True
    return False


def take_steps(run: Run, number: int) -> None:
    """Take the first ``number`` optimizer steps of a run, or all if it has fewer.

    Raises:
        ConfigError: the training diverged in them.
    """
    for epoch in range(run.schedule.epochs):
        if run.progress.step >= number:
            break
        steps = list(itertools.islice(run.schedule.steps(epoch), number - run.progress.step))
        batches = [run.local(batch) for step in steps for batch in step]
        loaded = fetched(run, batch_loader(run.data.train, batches, run.config.data.workers))
        run.wrapped.train()
        for step in steps:
            _train_step(run, step, loaded)
    expected = f"one with which {run.progress.step} steps have a finite loss"
    finite = all(bool(counted.isfinite().all()) for counted in run.pending)
    require(finite, "optimizer.lr", run.config.optimizer.lr, expected)


def _train_step(run: Run, step: list[list[Key]], loaded: Iterator[tuple[Any, Any]]) -> None:
    """One optimizer step on its global batches, of which ``loaded`` has this process's shares."""
    # Dropout is seeded by the step, so that a resumed run draws the same numbers.
    torch.manual_seed(derive_seed("step", run.config.seed, run.progress.step, run.partition.placement.rank))
    _freeze_when_due(run)
    counted = torch.zeros(2, dtype=torch.float64, device=run.device)
    samples = sum(map(len, step))
    once = run.config.norm.update_per == "step"
    with accumulate_statistics(run.model) if once else nullcontext():
        for batch in step:
            run.tell_groups(len(batch))
            inputs, targets = next(loaded)
            counted += _forward_backward(run, inputs, targets, step, last=batch is step[-1])
    if once and run.averages_running:
        run.shared.start()
        run.shared.finish()
    _divide_gradients(run, counted, samples)
    if run.config.norm.name == "nf":
        run.accelerator.unscale_gradients()
        clip_gradients(run.model, run.config.norm)
    _step(run)
    run.optimizer.zero_grad()
    run.scheduler.step()
    run.progress.step += 1
    run.progress.samples += samples
    run.pending.append(counted)


def _step(run: Run) -> None:
    try:
        run.optimizer.step()
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        # Scaled, divided by Adam's bias correction or multiplied by a weight decay, it has outgrown the weights' type.
        raise ConfigError("optimizer.lr", run.config.optimizer.lr, f"one whose steps can be taken ({error})") from error


def _freeze_when_due(run: Run) -> None:
    """`frozen`: from its step on, the layers use their running statistics, which are the same on all processes."""
    norm, training = run.config.norm, [layer for layer in run.norms if layer.training]
    if norm.name == "frozen" and training and run.progress.step >= int(norm.freeze_at * run.schedule.total_steps):
        reconcile(run.model)
        for layer in training:
            layer.eval()


def _forward_backward(run: Run, inputs: Any, targets: Any, step: list[list[Key]], last: bool) -> Tensor:
    """Add the gradients of a batch's loss; returns the loss's total and count on this process: float64 (2,)."""
    batch = step[-1] if last else step[0]  # all but the last are alike
    processes = run.partition.placement.processes
    # Processes exchange gradients once per optimizer step, with its last batch.
    with nullcontext() if last else run.accelerator.no_sync(run.wrapped):
        outputs = forward(run, run.wrapped, inputs, targets)
        total, count = loss_of(run, outputs, targets, run.partition.local_sizes(len(batch)))
        run.agree_on_counts(count)
        overlap = run.averages_running and run.config.norm.update_per == "forward"
        if overlap:
            run.shared.start()
        # DDP averages gradients over the processes, but the loss is a sum over them. The gradients are those of a mean
        # over the step's samples; what else there is to divide by is known when all batches of the step are.
        run.accelerator.backward(total / sum(map(len, step)) * processes)
        if overlap:
            run.shared.finish()
    here = torch.zeros(2, dtype=torch.float64, device=run.device)
    here[0], here[1] = total.detach(), count
    return here


def _divide_gradients(run: Run, counted: Tensor, samples: int) -> None:
    """Make the gradients those of the loss's mean over what it counts on all processes, if that is not the samples."""
    if run.counts_samples:
        return
    everywhere = counted.clone()
    if run.partition.placement.processes > 1:
        dist.all_reduce(everywhere)
    count = everywhere[1]
    factor = torch.where(count > 0, samples / count, 0.0)
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _evaluate(run: Run) -> None:
    done = run.progress
    recent = done.losses[-run.schedule.steps_per_epoch :]
    entry: dict[str, Any] = {"epoch": done.epoch, "step": done.step, "train_loss": sum(recent) / len(recent)}
    for part, samples in (("validation", run.data.validation), ("test", run.data.test)):
        if samples is not None:
            entry[part] = evaluate(run, samples)
            track(run.accelerator, {f"{part}_{name}": value for name, value in entry[part].items()}, done.step)
    done.history.append(entry)
    run.metrics.write([evaluation_record(entry)])


def _checkpoint(run: Run, out: Path | None) -> None:
    """Write a checkpoint, if the run has a folder. Of the run itself, nothing changes."""
    if out is None:
        return
    exchange_rows(run.model)
    own = differing_buffers(run.model, run.device)
    running = [b for layer in run.norms for b in (layer.running_mean, layer.running_var) if b is not None]
    with restored(running if own else []):
        if own:
            reconcile(run.model)  # for a reader of the weights, and for another number of processes
        if run.partition.placement.rank == 0:
            state = {"optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict()}
            state["scaler"] = None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict()
            state |= {"progress": vars(run.progress), "best": run.best, "own_buffers": own}
            state["counts_samples"] = run.counts_samples
            save_checkpoint(out / "checkpoint", run.progress.step, run.model, state, run.config)
    run.accelerator.wait_for_everyone()
    run.pace.saved = run.pace.paused = time.perf_counter()


def _result(run: Run) -> RunResult:
    done = run.progress
    # Each training loss is computed before its step, so only the evaluation shows what the last step did.
    part = "test" if run.data.validation is None else "validation"  # the test set may not choose a tuned option
    diverged = done.diverged or not math.isfinite(best_entry(run)[part]["loss"])
    final = {} if diverged else best_entry(run)
    evaluations, layers = ([], []) if diverged else evaluate_statistics(run, final["test"])
    return RunResult(
        status="diverged" if diverged else "ok",
        task=run.task_name,
        metric=run.task.metric,
        test=final.get("test"),
        validation=final.get("validation"),
        steps=done.step,
        samples=done.samples,
        seconds=done.seconds,
        samples_per_second=done.samples / max(done.seconds, 1e-9),
        parameters=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        losses=done.losses,
        history=done.history,
        evaluations=evaluations,
        layers=[asdict(layer) for layer in layers],
        peak_memory_bytes=peak_memory(run.device),
        train_samples=len(run.data.train),
        validation_samples=0 if run.data.validation is None else len(run.data.validation),
        test_samples=len(run.data.test),
        processes=run.partition.placement.processes,
        environment=environment(run.device) | ({} if run.task_name in BUILT_IN_NAMES else digest_of(run.task)),
        config=config_to_dict(run.config),
    )
