"""Logs of a run: metrics.jsonl, TensorBoard events, a progress bar, lines on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time

import numpy as np
from tqdm import tqdm

from jaxgen.errors import UserError
from jaxgen.files import replacing

# Fields of a line of metrics.jsonl that depend on the clock; all others repeat bit for bit.
CLOCK = ('images_per_second', 'seconds')
HELD_OUT = ('validation/', 'test/')  # how the names of metrics of held-out examples begin
_importing = threading.Lock()


def say(message: str) -> None:
    """One line to the person, on stderr, not through the progress bar."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        tqdm.write(f'jaxgen: {message}', file=sys.stderr)


class AfterFirst(tqdm):
    """A progress bar whose rate and time left are those after the first update: before it a program is compiled."""

    began = False

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if not self.began and not self.disable:
            self.began, self.initial, self.start_t = True, self.n, self._time()
            self.last_print_n, self.last_print_t = self.n, self.start_t  # else close() takes it for one never drawn
            self.refresh()
        return shown


def bar(total: int, what: str = '', quiet: bool = False, unit: str = 'image') -> tqdm:
    """A progress bar over images, or another unit, on stderr."""
    return AfterFirst(
        total=total, desc=what or None, unit=unit, dynamic_ncols=True, file=sys.stderr, smoothing=0, disable=quiet
    )


def steps_bar(step: int, steps: int) -> tqdm:
    """A progress bar over updates, from `step`, on stderr."""
    every = 0.5 if sys.stderr.isatty() else 10  # seconds between drawings; a log file needs few
    return tqdm(
        total=steps,
        initial=step,
        unit='step',
        dynamic_ncols=True,
        file=sys.stderr,
        mininterval=every,
        maxinterval=every,
    )


def summary_writer(directory: str, **options):
    """TensorBoard's events in `directory`."""
    with _importing:  # trainings may run in several threads
        # tensorboardX imports torch where there is one, which takes seconds, to draw graphs of networks: not used here.
        torch = sys.modules.get('torch')
        sys.modules['torch'] = torch  # type: ignore[assignment]  # None hides it
        try:
            from tensorboardX import SummaryWriter, event_file_writer
        finally:
            if torch is None:
                del sys.modules['torch']
        if not hasattr(event_file_writer.EventsWriter, 'failed'):
            event_file_writer.EventsWriter = _forgiving(event_file_writer.EventsWriter)
    return SummaryWriter(directory, **options)


@functools.cache
def _forgiving(writer: type) -> type:
    """A class that writes events as `writer` does until a write fails, says so and leaves the rest out. In the thread
    that writes them an exception is a traceback, and whoever hands it the next ones waits for ever."""

    def guard(method):
        def call(self, *args):
            if not self.failed:
                try:
                    return method(self, *args)
                except OSError as e:
                    self.failed = True
                    say(f'WARNING: TensorBoard events cannot be written: {e.strerror}; metrics.jsonl holds the same')

        return call

    guarded = {name: guard(getattr(writer, name)) for name in ('write_event', 'flush', 'close')}
    return type(writer.__name__, (writer,), {'failed': False, **guarded})


class Meter:
    """Means of the updates' logs since the last line. Its state is saved in the checkpoint, so that a
    resumed run writes the same lines as one that was never stopped."""

    def __init__(self, state: dict | None = None):
        self.count: int = state['count'] if state else 0
        self.sums: dict[str, float] = dict(state['sums']) if state else {}

    def add(self, logs: dict[str, float]) -> None:
        """Counts the logs of one update."""
        self.count += 1
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def state(self) -> dict:
        """The argument of a Meter that goes on from here."""
        return {'count': self.count, 'sums': dict(self.sums)}  # it is saved while the next updates are added

    def take(self) -> dict[str, float]:
        """The means so far; counting begins anew."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.count, self.sums = 0, {}
        return means


class Writer:
    """Writes one run's metrics. On resume, lines after the checkpoint's step are cut off first."""

    def __init__(self, workdir: str, step: int, steps: int, images_per_step: int):
        self.images_per_step = images_per_step
        self.path = os.path.join(workdir, 'metrics.jsonl')
        cut_back(self.path, step)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self.file = open(os.open(self.path, flags, 0o666), 'a', encoding='utf-8')  # noqa: SIM115, closed by close()
        self.board = summary_writer(os.path.join(workdir, 'tensorboard'), purge_step=step + 1, flush_secs=30)
        self.steps = steps
        self.bar: tqdm | None = None
        self.began = self.mark = time.monotonic()
        self.marked = step

    def progress(self, step: int, loss: float | None = None) -> None:
        """Moves the progress bar. It begins at the first call, so that the rate and the time left are of what follows:
        the compile is before."""
        if self.bar is None:
            self.bar = steps_bar(step, self.steps)
            self.mark, self.marked = time.monotonic(), step
        self.bar.update(step - self.bar.n)
        if loss is not None:
            rate = (self.bar.format_dict.get('rate') or 0.0) * self.images_per_step  # unknown at first
            images = f', {rate:.{0 if rate >= 10 else 1}f} images/s' if rate else ''
            self.bar.set_postfix_str(f'loss {loss:.4f}{images}', refresh=False)

    def line(self, step: int, means: dict[str, float]) -> None:
        """A line of the means of the updates' logs, and the clock."""
        now = time.monotonic()
        clock = {
            'images_per_second': (step - self.marked) * self.images_per_step / max(now - self.mark, 1e-9),
            'seconds': now - self.began,
        }
        self.mark, self.marked = now, step
        record = {'step': step, 'examples': step * self.images_per_step, **means, **clock}
        self.file.write(json.dumps(record) + '\n')
        self.file.flush()
        for name, value in {**means, **clock}.items():
            self.board.add_scalar(name, value, step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """A line of its own for the metrics of samples or of held-out examples at a step."""
        self.file.write(json.dumps({'step': step, 'examples': step * self.images_per_step, **values}) + '\n')
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def has_metrics(self, step: int, held_out: bool = False) -> bool:
        """Whether `metrics` has written those of samples, or of held-out examples, for this step."""
        with open(self.path, encoding='utf-8') as file:
            records = [r for r in map(as_record, file) if r and r['step'] == step and 'seconds' not in r]
        return any(held_out == any(name.startswith(HELD_OUT) for name in record) for record in records)

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        """An image, uint8 [H, W, C], for TensorBoard."""
        self.board.add_image(name, grid, step, dataformats='HWC')

    def pause(self) -> None:
        """Starts a new stretch of the clock: what was done since the last line was not training."""
        self.mark = time.monotonic()

    def close(self) -> None:
        for part in filter(None, (self.bar, self.file, self.board)):
            with contextlib.suppress(OSError):  # what could not be written was said
                part.close()


def as_record(line: str) -> dict | None:
    """A line of metrics.jsonl; None for what is none, like one that a kill or a full disk cut short."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get('step')) is int else None


def cut_back(path: str, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, and those that are no records: the last may have been cut short
    by a kill; of others a line is said.

    Raises:
      UserError: it is not a file.
    """
    if not os.path.lexists(path):
        return
    if not os.path.isfile(path):
        raise UserError(f'{path} is not a file: move it away, metrics are written there')
    with open(path, encoding='utf-8', errors='replace') as file:
        lines = [(line, as_record(line)) for line in file]
    foreign = sum(record is None for _, record in lines[:-1])
    if foreign:
        say(f'WARNING: {path}: {foreign} lines that no training wrote whole were left out')
    with replacing(path) as file:
        kept = (line for line, record in lines if record and record['step'] <= step)
        file.writelines((line.rstrip('\n') + '\n').encode('utf-8', 'replace') for line in kept)
