"""The table of layer times: between the measured sizes, beyond them, and of the wrong model."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from nemo_minitron.pruning.layer_times import FILE, Kind, LayerTimes, latency_of, read_layer_times
from nemo_minitron.pruning.size_space import Terms, size_space, source_costs
from nemo_minitron.workspace.manifest import write_json
from tests.pruning.test_size_search import LLAMA, of


def table(model):
    axes, sizes = ["hidden", "ffn"], [[1024, 2048, 4096], [3584, 14336]]
    wide = Kind(axes, sizes, [h * f / 1e8 for h, f in itertools.product(*sizes)])
    other = Kind(["hidden"], [[1024, 4096]], [1.0, 4.0])
    return LayerTimes(
        "a machine", "2.0", "llama", dict(model.sizes), "bfloat16", "decode", 1, 64, [wide, other],
        [0] * 30 + [1] * 2, Kind([], [], [0.5]),
    )  # fmt: skip


def test_a_pass_is_the_sum_of_its_layers_and_what_is_around_them():
    model = of(LLAMA)
    latency = latency_of(table(model), model)
    assert latency(range(32), model.sizes) == pytest.approx(30 * 4096 * 14336 / 1e8 + 2 * 4.0 + 0.5)
    # products of two sizes lie on the surface between the measured points, and beyond
    sizes = {**model.sizes, "hidden": 3072, "ffn": 7168}
    assert latency([0, 1, 31], sizes) == pytest.approx(2 * 3072 * 7168 / 1e8 + 3.0 + 0.5)
    small = {**model.sizes, "hidden": 512, "ffn": 1792}
    assert latency([0], small) == pytest.approx(512 * 1792 / 1e8 + 0.5)
    many = {**model.sizes, "hidden": np.array([[3072], [512]]), "ffn": np.array([[7168, 1792]])}
    assert latency([0], many)[0, 0] == pytest.approx(3072 * 7168 / 1e8 + 0.5)
    assert latency([0], many).shape == (2, 2)


def test_latency_is_a_cost_of_every_size():
    model = of(LLAMA)
    latency = latency_of(table(model), model)
    space = size_space(model, {"hidden": [2048, 4096], "layers": [16, 32]}, Terms(latency=latency))
    found = {tuple(space.at(i).values()): space.cost(i)["latency_ms"] for i in range(len(space))}
    assert found[4096, 32] == source_costs(model, Terms(latency=latency))["latency_ms"]
    assert found[2048, 16] == pytest.approx(16 * 2048 * 14336 / 1e8 + 0.5)


def test_a_table_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    model = of(LLAMA)
    times = table(model)
    write_json(tmp_path / FILE, dataclasses.asdict(times))
    assert read_layer_times(tmp_path / FILE) == times
    with pytest.raises(
        ValueError, match="of a llama of other sizes than this llama; run 'minitron measure-layers'"
    ):
        latency_of(times, of({**LLAMA, "num_hidden_layers": 31}))
    raw = dataclasses.asdict(times)
    raw["kinds"][0]["ms"].pop()
    (tmp_path / FILE).write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=r"damaged: expected 6 times for ascending sizes of .*, found 5"
    ):
        read_layer_times(tmp_path / FILE)
    with pytest.raises(
        ValueError, match=r"no such file: .*nowhere; 'minitron measure-layers' writes one"
    ):
        read_layer_times(tmp_path / "nowhere")
