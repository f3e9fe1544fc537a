"""Which samples and which learning rate the steps of a training in phases have."""

import pytest
import torch

from nemo_minitron.training.phases import Phase, PhasedSamples
from nemo_minitron.training.sampler import ConsumedSampler, Schedule


def samples(first, count, length):
    return first + torch.arange(count)[:, None] + torch.zeros(1, length + 1, dtype=torch.long)


SHORT, LONG = samples(0, 10, 4), samples(100, 6, 8)


def batches(phased, steps, per_step=1, skipped=frozenset(), start=0, rank=0, world=1, size=2):
    length = steps * per_step
    schedule = Schedule(start * per_step, length, length, rank, world)
    micro = frozenset(step * per_step + part for step in skipped for part in range(per_step))
    sampler = ConsumedSampler(
        len(phased), size, lambda step=None: schedule, 0, micro, lambda b: phased.place(b, per_step)
    )
    return list(sampler)


def test_each_batch_is_of_one_phase_and_a_text_that_comes_again_goes_on():
    phased = PhasedSamples([Phase(3, SHORT), Phase(2, LONG, 0.5), Phase(2, SHORT)])
    found = batches(phased, 7)
    assert [max(batch) < 10 for batch in found] == [True] * 3 + [False] * 2 + [True] * 2
    again = [index for batch in [*found[:3], *found[5:]] for index in batch]
    assert sorted(again) == list(
        range(10)
    )  # no sample of a text is read twice before all were once
    values = [phased[index] for index in found[3]]
    assert all(len(value) == 9 and value[0] >= 100 for value in values)
    assert batches(phased, 7, start=4) == found[4:]
    assert [phased.rate(step) for step in range(8)] == [1, 1, 1, 0.5, 0.5, 1, 1, 1]
    assert phased.steps_of(4) == [3, 1, 0] and phased.steps_of(7) == [3, 2, 2]
    assert phased.lengths() == [4, 8, 4] and phased.positions == 8


def test_ranks_and_micro_batches_share_the_samples_of_a_step():
    phased = PhasedSamples([Phase(2, SHORT), Phase(2, LONG)])
    alone = batches(phased, 4, size=4)
    two = [batches(phased, 4, rank=rank, world=2, size=2) for rank in (0, 1)]
    assert [sorted(one + other) for one, other in zip(*two, strict=True)] == list(
        map(sorted, alone)
    )
    parts = batches(phased, 4, per_step=2)
    assert [one + other for one, other in zip(parts[::2], parts[1::2], strict=True)] == alone


def test_a_step_that_is_left_out_moves_the_phases_up():
    phased = PhasedSamples([Phase(3, SHORT), Phase(2, LONG, 0.5)])
    skipped = frozenset({1})
    whole = batches(phased, 5)
    found = batches(phased, 5, skipped=skipped)
    assert found[:4] == [whole[0], *whole[2:]] and min(found[4]) >= 10
    assert phased.steps_of(3, skipped) == [2, 1]
    assert [phased.rate(step, skipped) for step in range(3)] == [1, 1, 0.5]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_is_taken_with_its_phases_rate_and_the_schedule_stays(optimizer):
    from types import SimpleNamespace

    from nemo_minitron.training.phases import PhaseRates, learning_rate

    weight = torch.nn.Parameter(torch.zeros(1))
    own = optimizer([weight], lr=0.1, weight_decay=0.0)
    trainer = SimpleNamespace(optimizers=[own], global_step=0)
    rates = PhaseRates(PhasedSamples([Phase(1, SHORT), Phase(1, LONG, 0.5)]), frozenset())
    trainer.callbacks = [rates]
    rates.on_train_start(trainer, None)
    moved = []
    for step in range(2):
        trainer.global_step, before = step, weight.item()
        weight.grad = torch.ones(1)
        assert learning_rate(trainer) == pytest.approx([0.1, 0.05][step])
        own.step()
        moved.append(before - weight.item())
        assert own.param_groups[0]["lr"] == 0.1
    assert moved == pytest.approx([0.1, 0.05], rel=1e-3)
