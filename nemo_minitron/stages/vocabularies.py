"""What the vocabularies of models share: padding, tokens of one alone, entries that a plan kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.layout import Workspace

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.losses.kept_entries import Entries


def shared_vocabulary(teacher: Path, student: Path, key: str = "distill.teacher") -> int | None:
    """Entries of both vocabularies that count, where one has others beside them; None: all.

    Teacher and student must speak of the same tokens: their tokenizers' files are compared. Tokens
    that the teacher alone has, behind all of the student's, do no harm: no text holds them.

    Args:
        teacher: its folder.
        student: its folder.
        key: which key of the configuration is to blame where they do not.

    Raises:
        ValueError: they do not.
    """
    from nemo_minitron.checkpoints.hf_config import read_config
    from nemo_minitron.checkpoints.side_files import tokenizer_fingerprint
    from nemo_minitron.models.causal_lm import load_tokenizer

    ours, theirs = read_config(student)["vocab_size"], read_config(teacher)["vocab_size"]
    if ours == theirs and tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student):
        return None
    entries, others = load_tokenizer(student).get_vocab(), load_tokenizer(teacher).get_vocab()
    shared = max(entries.values()) + 1
    for token in sorted(entries.keys() | others.keys()):
        own, other = entries.get(token), others.get(token)
        if own != other and (own is not None or other is None or other < shared):
            raise ValueError(
                f"{key}: {teacher} gives its token ids other meanings than the tokenizer of {student}: "
                f"{plain(token, 40)!r} is {_id(other)} there, and {_id(own)} here"
            )
    return None if ours == theirs and len(others) == len(entries) else shared


def kept_ids(config: Config) -> "Tensor | None":
    """The source's ids of the entries that the plan kept of its vocabulary; None: all are kept."""
    from nemo_minitron.families import VOCAB
    from nemo_minitron.pruning.plan_file import read_plan

    folder = Workspace(workspace_of(config)).plan
    if not folder.is_dir():  # cleaned away, or not of this workspace
        return None
    keep = read_plan(folder).keep
    return keep[VOCAB] if VOCAB in keep else None


def taught_entries(config: Config, teacher: Path, student: Path) -> "Entries":
    """What a teacher's and a student's vocabularies share; see ``shared_vocabulary``.

    Where the plan cut the vocabulary, each of the student's entries is one of the teacher's.

    Raises:
        ValueError: the teacher gives its ids other meanings.
    """
    return _entries(config, teacher, student, kept_ids(config), "distill.teacher")


def entries_of_all(config: Config, models: Mapping[str, Path]) -> "Entries":
    """What the vocabulary of the teacher that is measured shares with those of all other models.

    Of an export, which may be of another workspace, the export itself says which entries it kept.

    Raises:
        ValueError: one speaks of other tokens; by the key that names it.
    """
    from nemo_minitron.losses.kept_entries import KeptEntries

    settings = config.evaluate
    key = "distill.teacher" if settings.teacher is None else "evaluate.teacher"
    key = key if settings.model is None else "evaluate.model"
    named = {"student": key} | {name: f"evaluate.beside.{name}" for name in settings.beside}
    found = {
        name: _entries(config, models["teacher"], models[name], _kept_of(config, models[name]), key)
        for name, key in named.items()
    }
    first = found["student"]
    for name, each in found.items():
        both = [one.ids_V.tolist() for one in (first, each) if isinstance(one, KeptEntries)]
        if len(both) == 1 or (not both and each != first) or (both and both[0] != both[1]):
            raise ValueError(f"{named[name]}: its vocabulary is not the student's")
    return first


def _kept_of(config: Config, model: Path) -> "Tensor | None":
    """The ids of ``kept_ids``; of an export as it says itself."""
    from nemo_minitron.checkpoints.hf_config import read_config
    from nemo_minitron.evaluation.export_vocabulary import exported_ids

    ids = exported_ids(model, read_config(model)["vocab_size"])
    if ids is None:
        return kept_ids(config)
    from torch import tensor

    return tensor(ids)


def _entries(
    config: Config, teacher: Path, student: Path, kept_V: "Tensor | None", key: str
) -> "Entries":
    """What two vocabularies share; see ``taught_entries``.

    Args:
        config: the whole configuration.
        teacher: its folder.
        student: its folder.
        kept_V: ids of the student's entries in the model that it was cut from, Tensor of shape [entries];
            None: nobody says that it was cut.
        key: see ``shared_vocabulary``.
    """
    from nemo_minitron.checkpoints.hf_config import read_config
    from nemo_minitron.checkpoints.side_files import tokenizer_fingerprint
    from nemo_minitron.evaluation.export_vocabulary import is_cut_somehow

    same = tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student)
    rows = read_config(teacher)["vocab_size"]
    if not same and kept_V is None and is_cut_somehow(student, rows):
        raise ValueError(
            f"{key}: the vocabulary of {student} was cut, and its minitron.json does not say which entries "
            "of its teacher's it kept, as exports of earlier versions do not; evaluate it in the workspace "
            "that made it, or remove it there and run 'minitron export' again"
        )
    if same or kept_V is None:
        return shared_vocabulary(teacher, student, key)
    from nemo_minitron.losses.kept_entries import KeptEntries
    from nemo_minitron.models.causal_lm import load_tokenizer

    ids, theirs = kept_V.tolist(), load_tokenizer(teacher).get_vocab()
    for token, number in sorted(load_tokenizer(student).get_vocab().items()):
        if number >= len(ids) or theirs.get(token) != ids[number]:
            expected = _id(ids[number] if number < len(ids) else None)
            raise ValueError(
                f"{key}: {teacher} gives its token ids other meanings than the model that {student} was cut "
                f"from: {plain(token, 40)!r} is {_id(theirs.get(token))} there, and was {expected}"
            )
    if ids[-1] >= rows:
        raise ValueError(
            f"{key}: {teacher} has {rows:,} entries, and {student} was cut from a model with an entry "
            f"{ids[-1]:,}"
        )
    return KeptEntries(kept_V, config.distill.outside)


def _id(number: int | None) -> str:
    return "no token" if number is None else str(number)
