"""Frozen dataclasses as msgpack, checked against their own type hints on the way in.

What a dataclass declares is the schema: a field of the wrong type, a missing or surplus one, an unknown message or
trailing bytes is refused, and so is a value that the dataclass itself refuses. Nothing but data ever comes out.

Supported fields: bool, int, float, str, bytes, StrEnum, ``X | None``, tuples, mappings, dataclasses, and numpy arrays
of int32, int64 or bool. ``tuple[int, ...]`` and arrays travel as packed little-endian bytes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np

from ..runtime.errors import FuselineError, InvalidArgumentError


class _Coder(NamedTuple):
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


class MessageCodec:
    """Encodes and decodes a fixed, ordered set of dataclasses; both ends must be built with the same one."""

    def __init__(self, message_types: Sequence[type]) -> None:
        self._types = tuple(message_types)
        self._tags = {message_type: tag for tag, message_type in enumerate(self._types)}

    def encode(self, message: object) -> bytes:
        """One message as bytes.

        Raises:
            InvalidArgumentError: the codec does not know the message's type, or a field is not of its declared type.
        """
        tag = self._tags.get(type(message))
        if tag is None:
            raise InvalidArgumentError(f"{type(message).__name__} is not a message of this channel")
        try:
            packed: bytes = msgpack.packb([tag, _coder(self._types[tag]).encode(message)], use_bin_type=True)
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InvalidArgumentError(f"{type(message).__name__} cannot be encoded: {error}") from error
        return packed

    def decode(self, data: bytes) -> Any:
        """The message in ``data``.

        Raises:
            InvalidArgumentError: the bytes are not exactly one well-formed message.
        """
        try:
            tag, body = msgpack.unpackb(data, raw=False, strict_map_key=False)
            if type(tag) is not int or not 0 <= tag < len(self._types):
                raise ValueError(f"unknown message {tag!r}")
            return _coder(self._types[tag]).decode(body)
        except (TypeError, ValueError, OverflowError, RecursionError, FuselineError) as error:
            raise InvalidArgumentError(f"malformed message: {error}") from error


@cache
def _coder(hint: Any) -> _Coder:
    if hint in (bool, int, str, bytes):
        return _Coder(_exactly(hint), _exactly(hint))
    if hint is float:
        return _Coder(float, _exactly(float))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _Coder(str, hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_coder(hint)
    origin, args = get_origin(hint), get_args(hint)
    if hasattr(origin, "__value__"):  # of a `type` statement, as numpy's NDArray is one from 2.5 on
        return _coder(origin.__value__[args])
    if origin is tuple:
        return _tuple_coder(args)
    if origin in (dict, Mapping):
        return _mapping_coder(_coder(args[0]), _coder(args[1]))
    if origin is np.ndarray:
        return _array_coder(np.dtype(get_args(args[1])[0]))
    if origin in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner = _coder(args[0] if args[1] is type(None) else args[1])
        return _Coder(
            lambda value: None if value is None else inner.encode(value),
            lambda value: None if value is None else inner.decode(value),
        )
    raise TypeError(f"messages cannot carry {hint!r}")


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return check


def _dataclass_coder(kind: type) -> _Coder:
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    coders = [_coder(hints[name]) for name in names]

    def encode(value: Any) -> list[Any]:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
        return [coder.encode(getattr(value, name)) for name, coder in zip(names, coders, strict=True)]

    def decode(body: Any) -> Any:
        if type(body) is not list or len(body) != len(names):
            raise TypeError(f"{kind.__name__} wants a list of {len(names)} fields")
        return kind(*[coder.decode(item) for item, coder in zip(body, coders, strict=True)])

    return _Coder(encode, decode)


def _tuple_coder(args: tuple[Any, ...]) -> _Coder:
    if args == (int, ...):
        packed = _array_coder(np.dtype(np.int64))
        return _Coder(
            lambda value: packed.encode(np.asarray(value, np.int64)), lambda body: tuple(packed.decode(body).tolist())
        )
    if len(args) == 2 and args[1] is Ellipsis:
        item = _coder(args[0])
        return _Coder(
            lambda value: [item.encode(v) for v in value],
            lambda body: tuple(item.decode(v) for v in _exactly(list)(body)),
        )
    items = [_coder(arg) for arg in args]
    return _Coder(
        lambda value: [coder.encode(v) for coder, v in zip(items, value, strict=True)],
        lambda body: tuple(coder.decode(v) for coder, v in zip(items, _exactly(list)(body), strict=True)),
    )


def _mapping_coder(key: _Coder, value: _Coder) -> _Coder:
    return _Coder(
        lambda mapping: {key.encode(k): value.encode(v) for k, v in mapping.items()},
        lambda body: {key.decode(k): value.decode(v) for k, v in _exactly(dict)(body).items()},
    )


def _array_coder(dtype: np.dtype[Any]) -> _Coder:
    """One-dimensional arrays; the decoded one is a writable copy."""
    wire = dtype.newbyteorder("<")

    def encode(array: Any) -> bytes:
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            raise TypeError(f"expected a one-dimensional array of {dtype}")
        return array.astype(wire, copy=False).tobytes()

    def decode(body: Any) -> Any:
        array = np.frombuffer(_exactly(bytes)(body), np.uint8 if dtype == np.bool_ else wire)
        if dtype == np.bool_ and array.size and array.max() > 1:
            raise ValueError("a bool is 0 or 1")
        return array.astype(dtype)

    return _Coder(encode, decode)
