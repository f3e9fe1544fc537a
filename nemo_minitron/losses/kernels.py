"""Triton: forward KL and cross-entropy of a chunk of logits, and the gradient by the student's, as a kernel.

Written with torch's operations the same takes a dozen passes over the logits. Here each logit comes
from the card's memory once. A row's sums must be complete before its gradient can be made, so it is
read twice; the kernel takes few rows at a time, and at the second read they still lie in the L2
cache. Values and gradients: ``loss_terms._forward_kl_`` is the reference, and float64 the judge
(tests/losses/test_kernels.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_minitron.losses.loss_terms import LossWeights
from nemo_minitron.losses.projection import Logits

COLUMNS = 16_384
"""Logits of a row that one piece of work covers."""
BLOCK = 2048
"""Logits that a program holds at a time."""
CACHED_BYTES = 6 * 2**20
"""Logits of both models that are read twice within a short time: they fit into the L2 cache (H100: 50 MB)."""
PROGRAMS_PER_CORE = 2
_LOW = tl.constexpr(-1.0e30)
"""Below every logit, and finite: its difference from itself is 0."""
_LOG2_E = tl.constexpr(1.4426950408889634)
_SUMS = tl.constexpr(8)
"""Numbers that a piece of work leaves of its part of a row; six of them are used."""


@triton.jit
def _capped(x, cap, CAPPED: tl.constexpr):
    """Cap tanh(x / cap), by way of an exponential that cannot overflow."""
    if CAPPED:
        small = tl.exp(-2 * tl.abs(x) / cap)
        size = cap * (1 - small) / (1 + small)
        x = tl.where(x < 0, -size, size)
    return x


@triton.jit
def _logits(row, column, V, cap, CAPPED: tl.constexpr):
    """A row's logits under their softcap, below all others where there are none."""
    if CAPPED:
        inside = column < V
        x = tl.where(
            inside, _capped(tl.load(row + column, mask=inside, other=0.0), cap, True), _LOW
        )
    else:
        x = tl.load(row + column, mask=column < V, other=_LOW)
    return x


@triton.jit
def _sums_of_part(
    student, teacher, sums, first, V, inverse_tau, student_cap, teacher_cap,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TAUGHT: tl.constexpr, SOFTENED: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of a part of one row; every lane keeps its own until the end.

    Two blocks at a time: what has been summed so far is scaled to a new maximum once for both.
    """
    lanes = tl.arange(0, BLOCK)
    x_max = tl.full([BLOCK], _LOW, tl.float32)
    y_max = tl.full([BLOCK], _LOW, tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    q = tl.zeros([BLOCK], tl.float32)
    p = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    by_tau = inverse_tau * _LOG2_E
    for start in range(0, COLUMNS, 2 * BLOCK):
        column = first + start + lanes
        x = _logits(student, column, V, student_cap, STUDENT_CAPPED)
        x2 = _logits(student, column + BLOCK, V, student_cap, STUDENT_CAPPED)
        if TAUGHT:
            y = _logits(teacher, column, V, teacher_cap, TEACHER_CAPPED)
            y2 = _logits(teacher, column + BLOCK, V, teacher_cap, TEACHER_CAPPED)
        higher = tl.maximum(x_max, tl.maximum(x, x2))
        own = own * tl.exp2((x_max - higher) * _LOG2_E)
        own += tl.exp2((x - higher) * _LOG2_E) + tl.exp2((x2 - higher) * _LOG2_E)
        if SOFTENED:
            q = q * tl.exp2((x_max - higher) * by_tau)
            q += tl.exp2((x - higher) * by_tau) + tl.exp2((x2 - higher) * by_tau)
        x_max = higher
        if TAUGHT:
            higher = tl.maximum(y_max, tl.maximum(y, y2))
            shrunk = tl.exp2((y_max - higher) * by_tau)
            mass = tl.exp2((y - higher) * by_tau)
            mass2 = tl.exp2((y2 - higher) * by_tau)
            p = p * shrunk + (mass + mass2)
            gap = gap * shrunk + (mass * (y - x) + mass2 * (y2 - x2))
            y_max = higher
    top = tl.max(x_max, 0)
    tl.store(sums + 0, top)
    tl.store(sums + 1, tl.sum(own * tl.exp2((x_max - top) * _LOG2_E), 0))
    if SOFTENED:
        tl.store(sums + 2, tl.sum(q * tl.exp2((x_max - top) * by_tau), 0))
    if TAUGHT:
        top = tl.max(y_max, 0)
        shrunk = tl.exp2((y_max - top) * by_tau)
        tl.store(sums + 3, top)
        tl.store(sums + 4, tl.sum(p * shrunk, 0))
        tl.store(sums + 5, tl.sum(gap * shrunk, 0) * inverse_tau)


@triton.jit
def _gradient_of_part(
    student, teacher, sums, grad, terms, label, at_share, first, V, by_kl, by_ce, inverse_tau, student_cap,
    teacher_cap,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr, PADDED: tl.constexpr,
    TAUGHT: tl.constexpr, SOFTENED: tl.constexpr, STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, WANTED: tl.constexpr, VALUED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Puts the sums of a row's parts together, and makes the gradient of one part."""
    share = 1.0
    if SHARED:
        share = tl.load(at_share)
    part = tl.arange(0, PADDED)
    there = part < SUMMED
    by_tau = inverse_tau * _LOG2_E
    at = sums + part * _SUMS  # past the first-level cache, which may hold what was there before
    x_tops = tl.load(at, mask=there, other=_LOW, cache_modifier=".cg")
    x_top = tl.max(x_tops, 0)
    own = tl.load(at + 1, mask=there, other=0.0, cache_modifier=".cg")
    own_sum = tl.sum(own * tl.exp2((x_tops - x_top) * _LOG2_E), 0)
    q_sum = own_sum
    if SOFTENED:
        q = tl.load(at + 2, mask=there, other=0.0, cache_modifier=".cg")
        q_sum = tl.sum(q * tl.exp2((x_tops - x_top) * by_tau), 0)
    y_top = x_top
    p_sum = q_sum
    gap_sum = q_sum
    if TAUGHT:
        y_tops = tl.load(at + 3, mask=there, other=_LOW, cache_modifier=".cg")
        y_top = tl.max(y_tops, 0)
        shrunk = tl.exp2((y_tops - y_top) * by_tau)
        p = tl.load(at + 4, mask=there, other=0.0, cache_modifier=".cg")
        gap = tl.load(at + 5, mask=there, other=0.0, cache_modifier=".cg")
        p_sum = tl.sum(p * shrunk, 0)
        gap_sum = tl.sum(gap * shrunk, 0)
    if VALUED and first == 0:
        picked = _capped(tl.load(student + label), student_cap, STUDENT_CAPPED)
        tl.store(terms + 1, tl.log(own_sum) + x_top - picked)
        if TAUGHT:
            kl = gap_sum / p_sum - tl.log(p_sum) + tl.log(q_sum) + (x_top - y_top) * inverse_tau
            tl.store(terms, share * kl / (inverse_tau * inverse_tau))
    if WANTED:
        lanes = tl.arange(0, BLOCK)
        # softmax = 2^(x log2 e - this): the division by the sum is a part of the exponent
        own_log = x_top * _LOG2_E + tl.log2(own_sum)
        q_log = x_top * by_tau + tl.log2(q_sum)
        p_log = y_top * by_tau + tl.log2(p_sum)
        for start in range(0, COLUMNS, BLOCK):
            column = first + start + lanes
            inside = column < V
            x = _logits(student, column, V, student_cap, STUDENT_CAPPED)
            softmax = tl.exp2(x * _LOG2_E - own_log)
            slope = by_ce * (softmax - tl.where(column == label, 1.0, 0.0))
            if TAUGHT:
                y = _logits(teacher, column, V, teacher_cap, TEACHER_CAPPED)
                if SOFTENED:
                    softmax = tl.exp2(x * by_tau - q_log)
                slope += share * by_kl * (softmax - tl.exp2(y * by_tau - p_log))
            if STUDENT_CAPPED:
                slope *= 1 - (x / student_cap) * (x / student_cap)
            tl.store(grad + column, slope.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _no_gradient(grad, first, V, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros for a part of a row that does not count."""
    lanes = tl.arange(0, BLOCK)
    for start in range(0, COLUMNS, BLOCK):
        column = first + start + lanes
        tl.store(grad + column, tl.zeros([BLOCK], grad.dtype.element_ty), mask=column < V)


@triton.jit
def _terms_kernel(
    student, teacher, labels, shares, grad, terms, sums, counters, rows, V,
    student_stride, teacher_stride, grad_stride,
    by_kl, by_ce, inverse_tau, student_cap, teacher_cap,
    SUMS: tl.constexpr, GRADIENTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, SUMMED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    TAUGHT: tl.constexpr, SOFTENED: tl.constexpr, STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, WANTED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Works through pieces, each a part of a row, first for its sums, later for its gradient.

    ``ROWS`` rows make a group, and the pieces come in the order: sums of group 0, sums of 1,
    gradients of 0, sums of 2, gradients of 1 and so on. A program takes the next piece from a
    counter: what a gradient waits for has been taken before it by a program that runs, so that all
    of them come to an end, however many run at a time. ``SUMS`` and ``GRADIENTS`` alone are for
    what several ranks share: their sums meet in between.
    """
    groups = (rows + ROWS - 1) // ROWS
    size = ROWS * PARTS
    turns = groups * 2 if SUMS and GRADIENTS else groups
    piece = tl.atomic_add(counters + rows, 1)
    while piece < turns * size:
        group = piece // size
        is_sums = group >= 0 if SUMS else group < 0
        if SUMS and GRADIENTS:
            turn = piece // size
            ahead = (turn + 1) // 2
            is_sums = (turn == 0) | ((turn % 2 == 1) & (ahead < groups))
            group = tl.where(is_sums, ahead, tl.where(turn % 2 == 1, groups - 1, turn // 2 - 1))
        row = group * ROWS + piece % size // PARTS
        part = piece % PARTS
        if row < rows:
            label = tl.load(labels + row)
            wide = row.to(tl.int64)
            first = part * COLUMNS
            if is_sums:
                if label >= 0:
                    _sums_of_part(
                        student + wide * student_stride, teacher + wide * teacher_stride,
                        sums + (wide * PARTS + part) * _SUMS, first, V, inverse_tau, student_cap,
                        teacher_cap, COLUMNS, BLOCK, TAUGHT, SOFTENED, STUDENT_CAPPED,
                        TEACHER_CAPPED,
                    )  # fmt: skip
                tl.debug_barrier()
                tl.atomic_add(counters + row, 1, sem="release")
            else:
                if SUMS:
                    while tl.atomic_add(counters + row, 0, sem="acquire") < PARTS:
                        pass
                if label >= 0:
                    _gradient_of_part(
                        student + wide * student_stride, teacher + wide * teacher_stride,
                        sums + wide * SUMMED * _SUMS, grad + wide * grad_stride, terms + 2 * wide,
                        label, shares + row, first, V, by_kl, by_ce, inverse_tau, student_cap, teacher_cap,
                        COLUMNS, BLOCK, SUMMED, PADDED, TAUGHT, SOFTENED, STUDENT_CAPPED, TEACHER_CAPPED,
                        WANTED, SUMS, SHARED,
                    )  # fmt: skip
                elif WANTED:
                    _no_gradient(grad + wide * grad_stride, first, V, COLUMNS, BLOCK)
        piece = tl.atomic_add(counters + rows, 1)


@dataclass(frozen=True, eq=False)
class Chunk:
    """What the kernels work on.

    Attributes:
        student: logits, [tokens of the chunk, vocabulary], float32.
        teacher: the teacher's, same shape, and by which share each token's divergence counts; None:
            cross-entropy only.
        labels_C: next-token ids; a token whose label is negative counts for nothing, and its
            gradient is zero.
        weights: the mix.
    """

    student: Logits
    teacher: Logits | None
    labels_C: Tensor
    weights: LossWeights

    def terms(self, grad_CV: Tensor | None) -> Tensor:
        """Forward KL and cross-entropy of every token; writes the gradient of their weighted sum.

        Args:
            grad_CV: takes the gradient by the student's logits before the softcap, in its dtype;
                None: not wanted.

        Returns:
            Tensor of shape [tokens of the chunk, 2], float32: divergence and cross-entropy in nats;
            0 where a token does not count.
        """
        terms_C2 = torch.zeros(len(self.labels_C), 2, device=self.labels_C.device)
        self._launch(self._room(), grad_CV, terms_C2, both=True)
        return terms_C2

    def sums(self) -> Tensor:
        """Of every token, whose rank's part of the vocabulary this is: what ``SUMS`` names, one part a row.

        Returns:
            Tensor of shape [tokens of the chunk, parts, 8], float32: see ``_sums_of_part``.
        """
        found = self._room()
        self._launch(found, None, found, only_sums=True)
        return found

    def gradient(self, sums_C8: Tensor, grad_CV: Tensor) -> None:
        """Writes the gradient; ``sums_C8`` are those over all parts and ranks, [tokens of the chunk, 8]."""
        self._launch(sums_C8[:, None].contiguous(), grad_CV, sums_C8)

    @property
    def parts(self) -> int:
        """Parts of a row."""
        return int(triton.cdiv(self.student.raw_CV.shape[1], COLUMNS))

    def _room(self) -> Tensor:
        return self.student.raw_CV.new_zeros(len(self.labels_C), self.parts, _SUMS.value)

    def _launch(
        self,
        sums: Tensor,
        grad_CV: Tensor | None,
        terms: Tensor,
        *,
        both: bool = False,
        only_sums: bool = False,
    ) -> None:
        student_CV, weights = self.student.raw_CV, self.weights
        (rows, entries), device = student_CV.shape, student_CV.device
        out_CV = student_CV if grad_CV is None else grad_CV
        taught_CV, tau = student_CV, 1.0
        caps: tuple[float | None, float | None] = (self.student.cap, None)
        if self.teacher is not None:
            taught_CV, tau = self.teacher.raw_CV, weights.divergence.temperature
            caps = (self.student.cap, self.teacher.cap)
        mass_C = None if self.teacher is None else self.teacher.mass_T
        shares_C = None if mass_C is None else mass_C.float().contiguous()
        models = 1 if self.teacher is None else 2
        summed = sums.shape[1]
        settings: dict[str, Any] = {
            "SUMS": both or only_sums, "GRADIENTS": not only_sums, "COLUMNS": COLUMNS, "BLOCK": BLOCK,
            "PARTS": self.parts, "SUMMED": summed, "PADDED": triton.next_power_of_2(summed),
            "ROWS": max(1, min(rows, CACHED_BYTES // (4 * models * entries))),
            "TAUGHT": models == 2, "SOFTENED": tau != 1, "STUDENT_CAPPED": caps[0] is not None,
            "TEACHER_CAPPED": caps[1] is not None, "WANTED": grad_CV is not None,
            "SHARED": shares_C is not None,
        }  # fmt: skip
        # of every row how many of its parts have their sums; behind them the next piece of work
        counters = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        _terms_kernel[(_programs(device, 2 * rows * self.parts),)](
            student_CV, taught_CV, self.labels_C, student_CV if shares_C is None else shares_C, out_CV,
            terms, sums, counters, rows, entries,
            student_CV.stride(0), taught_CV.stride(0), out_CV.stride(0),
            float(weights.kl * tau), float(weights.ce), 1 / tau,
            float(caps[0] or 1), float(caps[1] or 1), **settings, num_warps=8,
        )  # fmt: skip


def check(device: str) -> None:
    """Builds and runs a kernel; whatever goes wrong is raised."""
    logits = Logits(torch.zeros(1, 16, device=device))
    labels_C = torch.zeros(1, dtype=torch.int64, device=device)
    Chunk(logits, None, labels_C, LossWeights(0, 1)).terms(torch.empty(1, 16, device=device))


def _programs(device: torch.device, pieces: int) -> int:
    if device.type != "cuda":  # Triton's interpreter runs one after another
        return 1
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return int(min(pieces, PROGRAMS_PER_CORE * cores))
