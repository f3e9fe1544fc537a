"""NeMo's configuration of a model and its ``.nemo`` archive."""

import errno
import pickle
import re
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from nemo.core.classes.common import ALLOWED_TARGET_PREFIXES
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron.checkpoints.dtypes import TORCH
from nemo_minitron.checkpoints.side_files import is_side_file, side_files, side_name
from nemo_minitron.families import Architecture
from nemo_minitron.security.links import refuse_link
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.atomic import replacing

CARD = "README.md"
TARGET = "nemo_minitron.plugin.model.MinitronModel"
"""What an archive says it is of, so that ``ModelPT.restore_from`` finds the class, too."""
ANY_SUBCLASS = "nemo.core.classes.modelPT.ModelPT"
"""The same of a class of somebody's own: NeMo takes the subclass whose ``restore_from`` is called."""
if (
    TARGET not in ALLOWED_TARGET_PREFIXES
):  # NeMo restores what is listed there, and has no other way in
    ALLOWED_TARGET_PREFIXES.append(TARGET)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH.values()}


def make_cfg(
    hf_config: dict[str, Any], folder: Path | None, optim: dict[str, Any] | None, **rest: Any
) -> DictConfig:
    """The NeMo ``cfg`` of a model: its config.json, the side files in ``folder``, and its optimiser.

    The card is among these: it names the licence.
    """
    card = [] if folder is None else [path for path in (folder / CARD,) if path.is_file()]
    for path in card:
        refuse_link(path, folder or path.parent)
    present = [] if folder is None else [*side_files(folder), *card]
    files = {_file_key(side_name(path, folder or path.parent)): str(path) for path in present}
    cfg = OmegaConf.create({"hf_config": hf_config, "files": files, **rest})
    if optim is not None:
        with open_dict(cfg):
            cfg.optim = OmegaConf.create(optim)
    return cfg


def _file_key(name: str) -> str:
    return name.replace(".", "__dot__")  # dots separate levels in NeMo's artifact keys


def file_name(key: str) -> str:
    """The file name that an entry of ``cfg.files`` means."""
    return key.replace("__dot__", ".")


def followed(before: Architecture, now: Architecture) -> dict[str, Any]:
    """A config.json with the sizes, and what it lists per unit, of the model in memory.

    transformers does not keep every spelling of a list (Nemotron-H's ``hybrid_override_pattern``
    becomes ``layers_block_type``): one that it has dropped stays as it is while it still fits.
    """
    changed = dict(before.resized(now.sizes).config)
    for name, axis in before.family.axes.items():
        held = [key for key in (*axis.lists, *axis.indices) if key in changed]
        lost = [key for key in held if key not in now.config]
        changed |= {key: now.config[key] for key in held if key not in lost}
        if lost and before.sizes[name] != now.sizes[name]:
            other = {key: now.config[key] for key in axis.lists if key in now.config}
            assert other, f"{lost}: transformers keeps no spelling of it"
            changed = {key: value for key, value in changed.items() if key not in lost} | other
    return changed


def dtypes_of(model: Any) -> dict[str, list[str]]:
    """Dtypes to the names of the parameters that are stored in them."""
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(str(parameter.dtype).removeprefix("torch."), []).append(name)
    return found


def as_stored(model: Any, cfg: DictConfig) -> Any:
    """A model with its weights in the dtypes that its configuration says they are stored in.

    Raises:
        ValueError: a dtype that models are not stored in, or a parameter that it does not have.
    """
    for dtype, names in (cfg.get("dtypes") or {}).items():
        if dtype not in _DTYPES:
            raise ValueError(f"dtypes: expected some of {', '.join(_DTYPES)}, found {dtype!r}")
        for name in names:
            try:
                parameter = model.get_parameter(name)
            except AttributeError as error:
                raise ValueError(f"dtypes.{dtype}: the model has no parameter {name!r}") from error
            parameter.data = parameter.data.to(_DTYPES[dtype])
    return model


def nemo_archive(model: Any, path: Path) -> Path:
    """Writes a ``.nemo`` archive atomically and returns its path."""
    with replacing(path) as temporary:
        model.save_to(str(temporary))
    return path


def check_archive(path: Path) -> None:
    """Refuses a ``.nemo`` archive that is not of ``MinitronModel``, or that refers to files outside of it.

    Nothing is unpacked; NeMo's own extraction refuses members that would land outside, and links.

    Raises:
        ValueError: it is no archive, one of another model, or its configuration is refused by
            ``check_restored``.
    """
    try:
        # opened as NeMo opens it: a file can be an archive in one way, and another archive in
        # another
        with SaveRestoreConnector._tar_open(str(path)) as archive:
            # by the names under which they are unpacked; of two with one name the later one stays
            members = {
                str(PurePosixPath(member.name)): member for member in archive if member.isfile()
            }
            config = members.get("model_config.yaml")
            file = None if config is None else archive.extractfile(config)
            text = "" if file is None else file.read(_LONGEST_CONFIG + 1).decode("utf-8")
        if len(text) > _LONGEST_CONFIG:
            raise ValueError(
                f"{path}: its model_config.yaml is longer than {_LONGEST_CONFIG:,} characters"
            )
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError(
                f"{path}: its model_config.yaml holds YAML aliases, which NeMo never writes"
            )
        cfg = OmegaConf.create(text)
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a .nemo archive ({error})") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"{path}: its model_config.yaml is no configuration: {plain(error, 200)}"
        ) from error
    if not isinstance(cfg, DictConfig) or "hf_config" not in cfg:
        raise ValueError(
            f"{path}: a .nemo archive of another model class, not one that this package wrote; convert it to "
            "a Hugging Face folder with the NeMo that made it (its scripts/checkpoint_converters)"
        )
    check_restored(cfg, str(path), members)


_LONGEST_CONFIG = 16 * 2**20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.EROFS}
_BROKEN = (
    pickle.UnpicklingError, tarfile.TarError, yaml.YAMLError, OmegaConfBaseException, EOFError,
    RuntimeError, OSError,
)  # fmt: skip
_UNFIT = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RecursionError)
"""What NeMo, torch and transformers raise where an archive's files are not what they should be."""


def damage(error: BaseException) -> str | None:
    """What is wrong with an archive that could not be restored, in a line; None: nothing is, or it is said.

    A full disk and memory that has run out are not the archive's fault, and a ``ValueError`` says
    what is wrong already.
    """
    if isinstance(error, _UNFIT):
        return "its files do not fit each other, or its configuration holds other types"
    if (
        not isinstance(error, _BROKEN)
        or getattr(error, "errno", None) in _NO_ROOM
        or "memory" in str(error)
    ):
        return None
    return plain(next(iter(str(error).strip().splitlines()), "cannot be read"), 200)


def check_restored(cfg: DictConfig, where: str, members: Collection[str] | None = None) -> None:
    """Refuses the configuration of a restored archive if it refers to files outside of the archive.

    Its files have the plain names that a model's files have, and are members of the archive: a key
    would otherwise name a file to write anywhere, a value one to read from anywhere. And what
    becomes config.json refers to nothing: a resolver would read, for instance, the environment.

    Args:
        cfg: what model_config.yaml holds; not resolved.
        where: for messages.
        members: names of the archive's files; None: not known.

    Raises:
        ValueError: it does.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    _check_targets(raw, where)
    if not isinstance(raw.get("hf_config"), dict):
        raise ValueError(
            f"{where}: hf_config: expected the model's config.json, found {plain(raw.get('hf_config'), 80)}"
        )
    files = raw.get("files") or {}
    if not isinstance(files, dict):
        raise ValueError(f"{where}: files: expected names of files, found {plain(files, 80)}")
    for key, value in files.items():
        name = file_name(str(key))
        if not is_side_file(name) and name != CARD:
            raise ValueError(
                f"{where}: files: {plain(name, 80)!r} is no name of a file that a model has"
            )
        member = str(value).removeprefix("nemo:")
        inside = str(value).startswith("nemo:") and PurePosixPath(member).name == member
        if not inside or (members is not None and member not in members):
            raise ValueError(
                f"{where}: files.{name}: {plain(value, 80)!r} is no file of the archive"
            )
    for key in ("hf_config", "dtypes"):
        reference = next((text for text in _texts(raw.get(key)) if "${" in text), None)
        if reference is not None:
            raise ValueError(
                f"{where}: {key}: {plain(reference, 80)!r} refers to something outside of it"
            )


def _check_targets(raw: dict[Any, Any], where: str) -> None:
    """Refuses what makes NeMo build something else than this model, or call something by its name.

    NeMo 3 takes ``model`` in place of the whole, ``cls`` and ``params`` for a class and its
    arguments, and calls any ``_target_`` of its own packages, among them tokenizers that load code
    from the hub.

    Raises:
        ValueError: it does.
    """
    if raw.get("target", TARGET) not in (TARGET, ANY_SUBCLASS):
        raise ValueError(f"{where}: target: expected {TARGET}, found {plain(raw['target'], 80)!r}")
    other = next((key for key in ("model", "cls", "params") if key in raw), None)
    if other is not None:
        raise ValueError(f"{where}: {other}: no entry of an archive of this package")
    waiting: list[Any] = [raw]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            target = part.get("_target_")
            if target is not None and not _OPTIMISERS.fullmatch(str(target)):
                raise ValueError(
                    f"{where}: _target_: {plain(target, 80)!r} is not called out of an archive"
                )
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    reference = next((text for text in _texts(raw) if "${oc." in text), None)
    if reference is not None:
        raise ValueError(f"{where}: {plain(reference, 80)!r} refers to something outside of it")


_OPTIMISERS = re.compile(r"torch\.optim\.(lr_scheduler\.)?[A-Z]\w*")


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested containers, names of entries among them."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            waiting += part
