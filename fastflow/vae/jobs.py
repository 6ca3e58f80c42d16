"""The runs of a comparison: one after the other, or several processes at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from tqdm import tqdm

from fastflow.vae.config import Config
from fastflow.vae.data import load
from fastflow.vae.errors import VaeError
from fastflow.vae.run_folder import find_state
from fastflow.vae.training import Run


@dataclass(frozen=True)
class Task:
    """A run to be started or continued: its folder, settings, images and device."""

    folder: Path
    settings: dict[str, Any]
    data_root: Path | None
    device: torch.device

    @property
    def name(self) -> str:
        return self.folder.name


class Progress(NamedTuple):
    """What a run says while it goes on."""

    line: str
    trained: int = 0  # epochs
    dropped: int = 0  # epochs that need not be trained: they were before, or the run ends early
    failed: bool = False


def perform(
    tasks: Sequence[Task], jobs: int, bar: tqdm, say: Callable[[str], None]
) -> dict[str, str]:
    """Trains and evaluates runs.

    Arguments:
        tasks: the runs.
        jobs: how many at a time. One stays in this process; more get a process each and share the
            threads of this one.
        bar: counts the epochs of all runs.
        say: gets one line per epoch.

    Returns:
        Why runs failed, by their names.
    """
    failures: dict[str, str] = {}

    def show(task: Task, progress: Progress) -> None:
        with tqdm.external_write_mode():  # else a line and the bar would run into each other
            say(f"{task.name}: {progress.line}")
        bar.total -= progress.dropped
        bar.update(progress.trained)
        bar.refresh()
        if progress.failed:
            failures[task.name] = progress.line

    if jobs > 1 and len(tasks) > 1:
        _perform_apart(tasks, jobs, show)
    else:
        for task in tasks:
            _perform(task, lambda progress, task=task: show(task, progress), bars=True)
    return failures


def _perform(task: Task, say: Callable[[Progress], None], bars: bool) -> None:
    """Trains and evaluates one run in this process. What keeps it from that is said; what would
    keep the other runs from it too, such as a full disk, is raised."""
    try:
        data = load(task.settings.get("data", Config.data), task.data_root)
        state = find_state(task.folder, task.settings)
        if state is None:
            run = Run.start(task.folder, Config(**task.settings), data, task.device)
        else:
            run = Run.resume(task.folder, state, data, task.device)
            done = len(run.history)
            say(Progress(f"continues after epoch {done}", dropped=done))
        # the last line of a run that stops early is that of no epoch
        run.train(lambda line: say(Progress(line, trained=int(not run.is_stopped))), bars)
        test = run.finish()
    except VaeError as error:
        say(Progress(str(error), failed=True))
        return
    say(
        Progress(
            f"test: -ELBO {test['negative_elbo']:.3f}, "
            f"-log p(x) {test['negative_log_likelihood']:.3f} nats per image",
            dropped=run.config.epochs - len(run.history),
        )
    )


def _perform_apart(
    tasks: Sequence[Task], jobs: int, show: Callable[[Task, Progress], None]
) -> None:
    """Gives every task a process, at most `jobs` of them at a time, and shows what they say."""
    context = multiprocessing.get_context("spawn")  # forked threads of a BLAS library may hang
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = list(tasks)
    running: dict[Connection, tuple[BaseProcess, Task]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, task, threads), daemon=True)
                _start(process)
                theirs.close()  # so that ours ends when the process does
                running[ours] = process, task
            ready: list[Any] = wait(list(running))  # of the connections
            for connection in ready:
                process, task = running[connection]
                try:
                    show(task, connection.recv())
                except EOFError:
                    process.join()
                    if process.exitcode:
                        show(task, Progress(f"ended with code {process.exitcode}", failed=True))
                    del running[connection]
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _start(process: BaseProcess) -> None:
    """Starts a process that no interrupt reaches, from its first instruction on: what a terminal
    sends to all processes is for the one that started them, which ends the others."""
    resource_tracker.ensure_running()  # the first start would start it, and unblock the signal
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()  # it inherits what is blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _child(connection: Connection, task: Task, threads: int) -> None:
    """Performs a task in a process of its own, which ends with the one that started it."""
    signal.signal(signal.SIGTERM, _leave)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which outlives a killed process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with closing(connection):
        _perform(task, connection.send, bars=False)


def _leave(*_: object) -> NoReturn:
    """Ends this process as Python does, which gives back what the system lent it."""
    raise SystemExit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    """A parent that was killed is continued by another one: nobody else may write to its runs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
