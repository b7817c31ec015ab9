"""Reading and writing run configurations: dictionaries, YAML files and command lines."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from syncbn.train.checks import ConfigError
from syncbn.train.config import RunConfig
from syncbn.train.result import jsonable


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's configuration from a YAML file; keys that the file leaves out have their defaults.

    Args:
        path: the YAML file; None starts from the defaults.
        overrides: values by dotted key, which replace those of the file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value has a wrong type or is out of range.

    Example:
        >>> import tempfile
        >>> from syncbn.train import load_config
        >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     print("{gpus: 4, norm: {name: sync}}", file=file, flush=True)
        ...     config = load_config(file.name, {"norm.momentum": 0.05})
        >>> config.gpus, config.norm.name, config.norm.momentum
        (4, 'sync', 0.05)
    """
    values = {} if path is None else _read(path)
    _check_keys(values, RunConfig)
    for key, value in (overrides or {}).items():
        section = values
        *parents, name = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return config_from_dict(values)


def _read(path: str | Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise ConfigError("config", str(path), f"a file that can be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"a file in YAML ({' '.join(str(error).split())})") from error


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Build a configuration from nested dictionaries; missing keys have their defaults. Raises ConfigError."""
    _check_keys(values, RunConfig)
    made: RunConfig = _built(values, RunConfig)
    return made


def _check_keys(values: Any, kind: type, prefix: str = "") -> None:
    if not isinstance(values, dict):
        raise ConfigError(prefix.removesuffix(".") or "config", values, "a mapping")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            close = difflib.get_close_matches(f"{prefix}{name}", known_keys(), n=3, cutoff=0.5)
            raise ConfigError(f"{prefix}{name}", value, "a known key" + f", such as {', '.join(close)}" * bool(close))
        if is_dataclass(hints[name]):
            _check_keys(value, hints[name], f"{prefix}{name}.")


def _built(values: Any, hint: Any) -> Any:
    """``values`` as ``hint`` has them: sections as dataclasses, numbers of float fields as floats."""
    if is_dataclass(hint):
        hints, section = get_type_hints(hint), cast(Any, hint)
        return section(**{name: _built(value, hints[name]) for name, value in values.items()})
    if get_origin(hint) in (list, tuple) and isinstance(values, list):
        return get_origin(hint)(_built(value, get_args(hint)[0]) for value in values)
    if hint is float or (get_origin(hint) in (Union, UnionType) and float in get_args(hint)):
        # YAML 1.1 reads 1e-3 as text. A bool is left for the check of types to refuse.
        try:
            return float(values) if isinstance(values, int | str) and not isinstance(values, bool) else values
        except ValueError:
            return values
    return values


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values. :func:`config_from_dict` reads them back."""
    plain: dict[str, Any] = jsonable(asdict(config))
    return plain


def save_config(config: RunConfig, path: Path) -> None:
    """Write all fields of the configuration as YAML."""
    path.write_text(config_to_yaml(config))


def config_to_yaml(config: RunConfig) -> str:
    """All fields of the configuration as YAML, in their order."""
    import yaml

    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def known_keys(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """All keys of the configuration, dotted."""
    hints = get_type_hints(kind)
    keys: list[str] = []
    for f in fields(kind):
        keys.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys += known_keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
