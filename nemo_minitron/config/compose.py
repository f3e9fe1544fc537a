"""Hydra: from a configuration name and overrides to a checked ``Config``."""

import contextlib
import copy
import dataclasses
import difflib
import functools
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import nemo_minitron
from nemo_minitron.config.bounds import check, check_handed_on
from nemo_minitron.config.config import Config
from nemo_minitron.config.option import describe
from nemo_minitron.config.overrides import check_overrides, ours, why_not
from nemo_minitron.config.training_config import PhaseConfig
from nemo_minitron.config.value_types import as_declared, misfit, type_of
from nemo_minitron.config.words import as_typed, check_file, unreadable
from nemo_minitron.families import use_tables

_PACKAGE = Path(nemo_minitron.__file__).parent
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""Folder of the configurations that come with the package.

Inside it where installed, beside it in a checkout.
"""

OPEN = ("trainer", "optim", "exp_manager", "pretrain.model", "pretrain.trainer", "pretrain.optim",
        "correct.trainer",
        "correct.optim", "launch.time_limits", "plan.budget.choices", "evaluate.servers",
        "evaluate.beside")  # fmt: skip
"""Sections that take any key with ``+``: what they hold is checked by those they are handed to."""


@functools.cache
def _schema() -> Any:
    """The sections and the types of their keys; making it takes longer than what it is merged with."""
    return OmegaConf.structured(Config)


@functools.cache
def _defaults() -> dict[str, Any]:
    return as_dict(Config())


def _unlike(values: Any, defaults: Any) -> Any:
    """Values without those that are the defaults, type and all: OmegaConf takes its time for each."""
    if not (isinstance(values, Mapping) and isinstance(defaults, Mapping)):
        return values
    return {
        key: _unlike(value, defaults.get(key))
        for key, value in values.items()
        if key not in defaults or repr(value) != repr(defaults[key])
    }


def _store_schema() -> None:
    """Puts the schema where Hydra looks for it, unless it is there; a host may keep another of its name."""
    store = ConfigStore.instance()
    there = store.repo.get("schema.yaml")
    if there is None or OmegaConf.get_type(there.node) is not Config:
        store.store(name="schema", node=Config)


def load_config(name: str, overrides: list[str], folder: str | None = None) -> Config:
    """Composes a configuration.

    Args:
        name: a configuration of the package (``configs/NAME.yaml``) or of ``folder``.
        overrides: in Hydra's grammar, ``plan.hidden=3072``, ``+trainer.limit_val_batches=2``,
            ``~optim.sched``.
        folder: a folder of the user's own, searched first.

    Returns:
        The configuration, every value checked against the schema.

    Raises:
        ValueError: an unknown or mistyped key (the nearest known ones are named), a value of the
            wrong type or out of range, an unknown configuration.
    """
    OmegaConf.register_new_resolver("stdlib", lambda: sysconfig.get_paths()["stdlib"], replace=True)
    _store_schema()
    own = Path(folder or CONFIGS).expanduser().resolve()
    if not own.is_dir():
        raise ValueError(f"--config-dir: no such folder: {own}")
    name = name.removesuffix(".yaml")
    overrides = [as_typed(override) for override in overrides]
    config = None if folder else _changed(name, overrides)
    return _checked(_by_hydra(name, overrides, own, folder) if config is None else config)


def _changed(name: str, overrides: list[str]) -> Config | None:
    """A configuration of the package with other values in some keys; None: that is not all there is to it.

    To compose again what is read once takes Hydra ten times as long, for each variant of a search. The
    value of a key is set as Hydra sets it (``ConfigLoaderImpl._apply_overrides_to_config``).
    """
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    try:
        config = copy.deepcopy(_unchanged(name, CONFIGS, _stamps(CONFIGS)))
        for each in OverridesParser.create().parse_overrides(overrides):
            plain = each.type is OverrideType.CHANGE and not each.is_sweep_override()
            if not plain or each.package is not None or each.key_or_group in groups:
                return None
            OmegaConf.update(config, each.key_or_group, each.value(), merge=True)
        with _nemo_s_resolvers():
            changed = OmegaConf.to_object(config)
    except Exception:  # Hydra's path has the words for whatever it is
        return None
    return changed if isinstance(changed, Config) else None


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells that a file has changed: a process that serves flows outlives an edit."""
    found = sorted((path, path.stat()) for path in folder.rglob("*.yaml"))
    return tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found)


@functools.lru_cache(maxsize=4)
def _unchanged(name: str, folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> Any:
    check_file(folder / f"{name}.yaml")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        return compose(name)


def _by_hydra(name: str, overrides: list[str], own: Path, folder: str | None) -> Config:
    GlobalHydra.instance().clear()
    try:
        check_file(own / f"{name}.yaml")
        with initialize_config_dir(str(own), version_base="1.3"):
            search = [] if folder is None else [f"hydra.searchpath=[file://{CONFIGS}]"]
            composed = _composed(name, overrides, search)
        values = OmegaConf.to_container(
            composed
        )  # without its schema, or keys added with + would pass
        merged = OmegaConf.merge(_schema(), values)
        with _nemo_s_resolvers():
            config = OmegaConf.to_object(merged)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(
            unreadable(overrides)
            or _named_otherwise(overrides)
            or _mistyped(overrides)
            or _explain(error, name, own)
        ) from error
    except (TypeError, AttributeError, AssertionError, RecursionError, OverflowError) as error:
        # Hydra's own, where an override puts something else in the place of a section, or infinity
        # in that of a whole number
        raise ValueError(
            _mistyped(overrides) or f"cannot be composed: {' '.join(overrides)}"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{own}: a configuration is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    assert isinstance(config, Config)
    return config


def _composed(name: str, overrides: list[str], search: list[str]) -> Any:
    try:
        return compose(name, [*overrides, *search])
    except ValueError as error:  # Hydra's own word for null in the place of a section
        raise ValueError(_mistyped(overrides) or f"cannot be composed: {error}") from error


def _gpu_name() -> str | None:
    """As NeMo: a100 or h100 by the first card's compute capability; None for others, and without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return {8: "a100", 9: "h100"}.get(major)


def multiply(x: Any, y: Any) -> Any:
    """The product; an error of it tells its name."""
    return x * y


RESOLVERS: dict[str, Callable[..., Any]] = {
    "multiply": multiply,
    "sum": lambda x, y: x + y,
    "gpu_name": _gpu_name,
}
"""What NeMo's scripts have in their configurations: ``${multiply:2,3}``."""


@contextlib.contextmanager
def _nemo_s_resolvers() -> Iterator[None]:
    """Registers those of NeMo's that are not there, and takes them away again.

    NeMo registers them when it is imported, which takes 10 to 20 seconds, and ``gpu_name`` only once.
    """
    missing = [name for name in RESOLVERS if not OmegaConf.has_resolver(name)]
    for name in missing:
        OmegaConf.register_new_resolver(name, RESOLVERS[name])
    try:
        yield
    finally:
        for name in missing:
            OmegaConf.clear_resolver(name)


def _named_otherwise(overrides: list[str]) -> str | None:
    """One line on the first override that NeMo's scripts have, and this command line calls otherwise."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    named = ((key, ours(key)) for key in keys)
    return next(
        (f"{key}: no such configuration key; here it is {other}" for key, other in named if other),
        None,
    )


def _mistyped(overrides: list[str]) -> str | None:
    """One line on the first override whose value does not have the type of its key."""
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    for override in overrides:
        parsed = OverridesParser.create().parse_override(override)
        key, value = parsed.key_or_group, parsed.value()
        chosen = key in groups and isinstance(value, str | list)
        typed = not (chosen or parsed.is_delete() or parsed.is_sweep_override())
        hint = type_of(Config, key) if typed else None
        if hint is not None and (said := misfit(hint, _plain_values(value), key)):
            return said
    return None


def _plain_values(value: Any) -> Any:
    """What Hydra's grammar reads, as YAML's values."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain_values(entry) for entry in value]
    if isinstance(value, dict):
        return {str(name): _plain_values(entry) for name, entry in value.items()}
    return value


def _explain(error: Exception, name: str, folder: Path) -> str:
    """One line: what is wrong and, for a key that is not known, which known ones are near."""
    text = str(error)
    deeper = error.__cause__ or error.__context__  # Hydra wraps what OmegaConf says
    cause = deeper if isinstance(deeper, OmegaConfBaseException) else error
    full_key = getattr(cause, "full_key", None)
    inside = re.search(r"Key '([^']+)' not in 'PhaseConfig'", str(cause))
    if inside:
        there = ", ".join(item.name for item in dataclasses.fields(PhaseConfig))
        return f"training.phases: a phase has no {inside[1]!r}; there are: {there}"
    wanted = re.search(r"Could not (?:override|append to|delete from)[^'\n]*'([^']+)'", text)
    if wanted and text.startswith("Could not append"):
        return f"{wanted[1]}: is there already; write {wanted[1]}=... without +, or ++ for either"
    if wanted:
        return _unknown_key(wanted.group(1))
    if re.search(r"Key '[^']+' (?:is not in struct|not in)", text) and full_key:
        return _unknown_key(str(full_key))
    if "Cannot find primary config" in text:
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        return (
            f"--config-name: no configuration {name!r} in {folder}; there are: {', '.join(known)}"
        )
    choice = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if choice:
        group, value = choice.groups()
        known = sorted(
            path.stem for root in {folder, CONFIGS} for path in (root / group).glob("*.yaml")
        )
        return f"{group}: no choice {value!r}; there are: {', '.join(known)}"
    ambiguous = re.search(r"Ambiguous value for argument '([^=']+)=([^']*)'", text)
    if ambiguous:
        return f"{ambiguous[1]}: expected one value, found {ambiguous[2]}; a list goes in brackets"
    missing = re.search(r"Interpolation key '([^']+)' not found", text)
    if missing:
        where = f"{full_key}: " if full_key else ""
        return (
            f"{where}${{{missing[1]}}}: no such configuration key; a shell's variable is written "
            f"${missing[1]}, one of the environment here ${{oc.env:{missing[1]}}}"
        )
    if "is not a ListConfig" in text and full_key:
        return f"{full_key}: expected a list, as in {full_key}=[first,second]"
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    first = re.sub(r"^\w+ raised while resolving interpolation: ", "cannot be resolved: ", first)
    return f"{full_key}: {first}" if full_key else first


def _unknown_key(key: str) -> str:
    known = [name for name, _, _ in describe(Config)] + list(OPEN)
    near = difflib.get_close_matches(key, known, 3, 0.5)
    leaf = key.rsplit(".", 1)[-1]
    near += [name for name in known if name.rsplit(".", 1)[-1] == leaf and name not in near]
    hint = f"; nearest known: {', '.join(near[:3])}" if near else ""
    if key in known:
        return f"{key}: its entries are added one by one, as in +{key}.NAME=VALUE"
    section = next((name for name in OPEN if key.startswith(f"{name}.")), None)
    if section and (reason := why_not(key)):
        return f"{key}: {reason}"
    if section:
        hint = f"; {section} is handed on as it is: write +{key}=... to add a key"
    return f"{key}: no such configuration key{hint}"


def _checked(config: Config) -> Config:
    _take_synonyms(config)
    _check_values(config)
    if config.families.path is not None:
        use_tables(config.families.path)
    return config


def _take_synonyms(config: Config) -> None:
    for name, item, _ in describe(Config):
        *sections, key = name.split(".")
        synonyms = item.metadata["synonyms"]
        if synonyms:
            section = functools.reduce(getattr, sections, config)
            value = str(getattr(section, key))
            setattr(section, key, synonyms.get(value.lower(), value))


def _check_values(config: Config) -> None:
    for name, item, _ in describe(Config):
        choices = item.metadata["choices"]
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        _check_sections(name, value)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip():
                raise ValueError(
                    f"{name}: empty (an unset variable?); give it a value, or leave it out"
                )
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
        check(name, item.metadata["bounds"], value)
    check_handed_on(as_dict(config))
    check_overrides(as_dict(config))


def _check_sections(name: str, value: Any) -> None:
    """Checks the numbers in a list of sections."""
    sections = value if isinstance(value, list) else []
    for number, section in enumerate(sections):
        if dataclasses.is_dataclass(section):
            for item in dataclasses.fields(section):
                own = getattr(section, item.name)
                check(f"{name}[{number}].{item.name}", item.metadata["bounds"], own)


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, for crossing process borders."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The configuration back from plain dictionaries.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    try:
        own = _unlike(as_declared(Config, values), _defaults())
        config = OmegaConf.to_object(OmegaConf.merge(_schema(), own))
    except (OmegaConfBaseException, OverflowError) as error:
        said = misfit(Config, values, "") or _explain(error, "parameters", CONFIGS)
        raise ValueError(said) from error
    assert isinstance(config, Config)
    return _checked(config)
