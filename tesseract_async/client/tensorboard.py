"""TensorBoard: a callback that writes each step's figures where TensorBoard reads them."""

from typing import Protocol

from tesseract_async.client.trainer import StepReport


class Writer(Protocol):
    """The part that is used of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Write one figure."""


class TensorBoard:
    """A callback of `AsyncTrainer` that writes loss, staleness, seconds and `StepReport.metrics` of each step.

    ::

        from torch.utils.tensorboard import SummaryWriter

        trainer = ta.AsyncTrainer(model, optimizer, callbacks=[ta.TensorBoard(SummaryWriter("runs/first"))])

    The writer is yours: close it. Steps that failed are counted as ``failures``.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._num_failures = 0

    def __call__(self, report: StepReport) -> None:
        if report.error is not None:
            self._num_failures += 1
            self._writer.add_scalar("failures", self._num_failures, report.version)
            return
        figures = {"loss": float(report.loss), "staleness": report.staleness, "seconds": report.seconds}
        for name, figure in (figures | dict(report.metrics)).items():
            self._writer.add_scalar(name, figure, report.version)
