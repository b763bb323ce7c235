"""Typed reading of a JSON configuration file; every complaint names file, field and value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from ...runtime.errors import ModelFormatError, NotFoundError

MAX_FILE_BYTES = 16 * 2**20


class ConfigFields:
    """The fields of one JSON object. A field that is null counts as absent, as it does in transformers.

    Args:
        path: of the file, for messages.
        prefix: put before field names in messages, for nested objects.
    """

    def __init__(self, path: Path, values: Mapping[str, object], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path) -> ConfigFields:
        """Parse a file.

        Raises:
            NotFoundError: there is no such file.
            ModelFormatError: it cannot be read, is too large, not JSON, or not an object.
        """
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise ModelFormatError(f"{path}: {size} bytes is too large for a configuration", file=path)
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotFoundError(f"{path} does not exist", file=path) from None
        except OSError as error:
            raise ModelFormatError(f"{path} cannot be read: {error.strerror}", file=path) from error
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(f"{path} is not valid JSON: {error}", file=path) from error
        if not isinstance(values, dict):
            raise ModelFormatError(f"{path} must hold a JSON object, not {type(values).__name__}", file=path)
        return cls(path, values)

    def error(self, field: str, wanted: str) -> ModelFormatError:
        """The error to raise when ``field`` is not what is ``wanted``."""
        value = self._values.get(field)
        found = f"{value!r}" if field in self._values else "nothing"
        name = self._prefix + field
        return ModelFormatError(
            f"{self.path}: {name} must be {wanted}, found {found}", file=self.path, field=name, value=value
        )

    def __contains__(self, field: str) -> bool:
        return self._values.get(field) is not None

    def names(self) -> list[str]:
        """The fields that are there, null or not."""
        return list(self._values)

    def value(self, field: str) -> object:
        """The field as it is, None when absent."""
        return self._values.get(field)

    def states(self, field: str) -> bool:
        """Whether the field is there, be it null."""
        return field in self._values

    def integer(self, field: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """An integer from ``minimum`` to ``maximum``; required unless it has a default."""
        value = self._values.get(field)
        if value is None and default is not None:
            return default
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(field, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number above zero; required unless it has a default."""
        value = self._values.get(field)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(field, "a finite number above zero")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(field, "true or false")
        return value

    def text(self, field: str, default: str | None = None) -> str:
        """A string; required unless it has a default."""
        value = self._values.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(field, "a string")
        return value

    def texts(self, field: str) -> list[str]:
        """A list of strings, empty when absent."""
        value = self._values.get(field)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(field, "a list of strings")
        return value

    def integers(self, field: str) -> list[int]:
        """An integer or a list of them, none negative; empty when absent."""
        value = self._values.get(field)
        if value is None:
            return []
        items = value if isinstance(value, list) else [value]
        ids = [item for item in items if type(item) is int and item >= 0]
        if len(ids) != len(items):
            raise self.error(field, "a token id or a list of them")
        return ids

    def nested(self, field: str) -> ConfigFields | None:
        """An object, None when absent."""
        value = self._values.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(field, "an object")
        return ConfigFields(self.path, value, f"{self._prefix}{field}.")
