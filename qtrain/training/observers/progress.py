"""What a person sees while a run trains: a bar in a terminal, a line at each interval in a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from qtrain.training.observers.measure import Line, by_source
from qtrain.training.observers.observer import Observer
from qtrain.units import describe_time, readable


class Progress(Observer):
    """Loss, learning rate, tokens/s and time left; listens to the recorder's lines."""

    def __init__(self, console: Console, show_bar: bool, steps: int):
        self.console = console
        self.steps = steps
        self.first = 0
        self.started = 0.0
        self.bar = Bar(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not (show_bar and console.is_terminal),
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("training", total=steps, loss="-", lr="-", speed="-")

    def listen(self, line: Line) -> None:
        if "val_loss" in line:
            self.console.print(
                f"step {line['step']:>6}  validation loss {line['val_loss']:.4f}  "
                f"{line['val_bits_per_byte']:.4f} bits per byte",
                highlight=False,
            )
            for name, found in by_source(line).items():
                self.console.print(
                    f"{'':11}  {name}: validation loss {found['loss']:.4f}  {found['bits_per_byte']:.4f} bits per byte",
                    highlight=False,
                )
            return
        if "loss" not in line:
            return
        self.bar.update(
            self.task, loss=f"{line['loss']:.4f}", lr=f"{line['lr']:.2e}", speed=readable(line["tokens_per_second"])
        )
        if self.bar.disable:
            elapsed = time.perf_counter() - self.started
            left = elapsed / max(1, line["step"] - self.first) * (self.steps - line["step"])
            self.console.print(
                f"step {line['step']:>6}/{self.steps}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  "
                f"{readable(line['tokens_per_second'])} tokens/s  {describe_time(round(left))} left",
                highlight=False,
            )

    def on_start(self, step: int) -> None:
        self.first = step
        self.started = time.perf_counter()
        self.bar.update(self.task, completed=self.first)
        self.bar.start()

    def on_step_end(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def on_end(self) -> None:
        self.bar.stop()
