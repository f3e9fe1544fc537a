"""Options of a training that exclude each other, and the state that they can go on with."""

import re

import pytest

from nemo_minitron.plugin.options import Options
from nemo_minitron.plugin.trainer import newest_checkpoint
from nemo_minitron.workspace.layout import checkpoints_in
from tests.support.models import make_model
from tests.support.nemo_training import run


def test_ranks_share_the_layers_of_a_model_that_is_split_only(tmp_path):
    with pytest.raises(
        ValueError, match=r"^training\.tensor_parallel=2: .*training\.parallel=shard"
    ):
        run(
            make_model(tmp_path / "m", "llama"),
            tmp_path / "s",
            2,
            options=Options(tensor_parallel=2),
        )


@pytest.mark.parametrize(("before", "after"), [("replicate", "shard"), ("shard", "replicate")])
def test_a_state_of_the_other_kind_is_refused_and_stays(tmp_path, before, after):
    folder, state = make_model(tmp_path / "m", "llama"), tmp_path / "state"
    if before == "replicate":
        run(folder, state, 3)
    else:  # a folder of parts, which is refused by what it is
        parts = checkpoints_in(state) / "step=3.ckpt"
        parts.mkdir(parents=True)
        (parts / ".metadata").touch()
    saved = newest_checkpoint(checkpoints_in(state))
    told = rf"^training\.parallel={after}: .*{re.escape(str(saved))}.*set training\.parallel={before} again"
    with pytest.raises(ValueError, match=told):
        run(folder, state, 6, options=Options(shard=after == "shard"))
    assert newest_checkpoint(checkpoints_in(state)) == saved
