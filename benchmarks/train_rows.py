"""The lines of the whole-model benchmark's CSV."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one point. Bytes and milliseconds are None where nothing was measured.

    Attributes:
        size, layers: of the model; ``layers`` is below the size's own where the depth was cut.
        is_cut: 1 where the depth was cut, else 0.
        method: with its options, as given on the command line.
        compiler: what compiled the graphs: ``inductor``, or ``aot_eager``.
        seq, batch, micro: tokens of a sequence, sequences of a micro-batch, micro-batches of a step.
        fits: ``max`` where ``batch`` is the largest power of two that fits, else empty.
        cap_bytes: most that PyTorch's allocator was let hold; None where it could take all of the card.
        step_ms, step_ms_q20, step_ms_q80: median of an optimizer step, and quantiles at 20 and 80 %; with the share of what
            is not done at every step.
        tokens_per_s: of the median.
        forward_ms, backward_ms, optimizer_ms: medians of other steps, all micro-batches together; the optimizer's with the share.
        retraction_ms: of the optimizer's time, what folds rotations into weights.
        rare_ms, rare_period: work that is done once in so many steps; its share in a step is ``rare_ms / rare_period``.
        timed_by: ``events``, or ``clock`` on a CPU.
        steps: that were timed.
        first_step_s: seconds of the first step, conversion and compilation in it; not the making of the model.
        caches: of compiled code: ``cold`` where they were empty at first, else ``shared``.
        peak_bytes, reserved_bytes: most that tensors took during the timed steps, and most that the allocator held.
        planned_bytes: the package's estimate of ``peak_bytes``; None where it was not asked for, or does not know the method.
        weight_bytes: parameters and buffers, adapters too. residual_bytes: digits below bfloat16. gradient_bytes: after the
            last backward. state_bytes: of optimizers; rotations ``q`` and their permutations too. rest_bytes: of the peak:
            activations and scratch memory.
        parameters, trained: numbers in weights, and numbers that the optimizer trains.
        flops, bytes: at least, by ``model_floors.py``.
        floor_ms: the least time, of which training is forward and backward. gap: ``step_ms`` over it.
        loss: of the last timed step.
        note: what else belongs to the row. reason: why nothing was measured.
    """

    size: str
    layers: int
    is_cut: int
    method: str
    compiler: str
    seq: int
    batch: int
    micro: int
    fits: str = ""
    cap_bytes: int | None = None
    step_ms: float | None = None
    step_ms_q20: float | None = None
    step_ms_q80: float | None = None
    tokens_per_s: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None
    retraction_ms: float | None = None
    rare_ms: float | None = None
    rare_period: int | None = None
    timed_by: str = ""
    steps: int | None = None
    first_step_s: float | None = None
    caches: str = ""
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    planned_bytes: int | None = None
    weight_bytes: int | None = None
    residual_bytes: int | None = None
    gradient_bytes: int | None = None
    state_bytes: int | None = None
    rest_bytes: int | None = None
    parameters: int | None = None
    trained: int | None = None
    flops: int | None = None
    bytes: int | None = None
    floor_training_ms: float | None = None
    floor_optimizer_ms: float | None = None
    floor_retraction_ms: float | None = None
    floor_ms: float | None = None
    gap: float | None = None
    loss: float | None = None
    note: str = ""
    reason: str = ""

    @property
    def point(self) -> tuple[str, int, int, int, str, int, int | None]:
        """Where methods are compared.

        Batches that were searched for are one point, whatever was found, for each cap: it decides what is found. A batch that
        was given is the same work under every cap.
        """
        batch, cap_bytes = (0, self.cap_bytes) if self.fits else (self.batch, None)
        return self.size, self.layers, self.seq, batch, self.fits, self.micro, cap_bytes

    @property
    def label(self) -> str:
        """The method, and its cap."""
        return self.method if self.cap_bytes is None else f"{self.method}, capped at {self.cap_bytes / 1e9:g} GB"

    @property
    def is_out_of_memory(self) -> bool:
        return "out of memory" in self.reason.lower()
