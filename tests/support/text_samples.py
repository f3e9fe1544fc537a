"""Text sets and samples for tests."""

import torch

from nemo_minitron.data.calibration_samples import Samples
from nemo_minitron.data.documents import find_text


def padded(count=4, length=12, vocabulary=96):
    """Samples one token longer than the length, two of them padded."""
    torch.manual_seed(0)
    tokens = torch.randint(2, vocabulary, (count, length + 1))
    valid = torch.ones(count, length + 1, dtype=torch.bool)
    valid[0, 9:] = valid[2, 5:] = False
    return Samples(tokens, valid)


def found(paths, side="all", holdout=0.0, **changes):
    options = {
        "exclude": [],
        "format": "auto",
        "text_key": "text",
        "where": "data.train",
        **changes,
    }
    return find_text([str(path) for path in paths], side=side, holdout=holdout, **options)
