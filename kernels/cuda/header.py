"""Reads the C headers of the kernels: their constants, their argument structs, their entry points.

The headers are the one statement of the tile sizes and of the C ABI; Python reads them instead of repeating them.
Only a small part of C++ is understood, and anything else in a header that is read is an error:

    constexpr int NAME = <integer expression over earlier names>;
    #define NAME <integer>
    typedef struct { <field>; ... } name;      fields: numbers, pointers, earlier structs, and arrays of them
    typedef <number> name;
    int fl_cuda_name(const name* args);

in any order, with comments, includes, namespaces and what is for C++ only between them.
"""

from __future__ import annotations

import ast
import ctypes
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE_FOLDER = Path(__file__).parent.parent / "csrc" / "cuda"

_NUMBERS: dict[str, Any] = {
    "int": ctypes.c_int,
    "uint16_t": ctypes.c_uint16,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
}
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
_CONSTANT = re.compile(r"constexpr\s+(?:int|int32_t|uint32_t|int64_t)\s+(\w+)\s*=\s*([^;]+);|#define +(\w+) +(\d+)")
_STRUCT = re.compile(r"typedef\s+struct\s*\{([^{}]*)\}\s*(\w+)\s*;")
_ALIAS = re.compile(r"typedef\s+(\w+)\s+(\w+)\s*;")
_FIELD = re.compile(r"(?:const\s+)?(\w+)\s*(\*?)\s*(\w+)(?:\[(\w+)\])?")
_FUNCTION = re.compile(r"(int|int32_t|int64_t|const\s+char\s*\*)\s*(fl_cuda_\w+)\s*\(([^)]*)\)\s*;")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|#ifdef __cplusplus\n.*?#endif", re.DOTALL)
_IGNORED = re.compile(r'#\s*(?:pragma once|include\s*[<"][^\n]*)|namespace\s+[\w:]*|[{}]')


class HeaderError(ValueError):
    """A header holds something that is not understood."""


@dataclass(frozen=True, slots=True)
class Function:
    """An entry point: ctypes of its result and its arguments; a struct is passed by pointer."""

    result: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What headers state, by name."""

    constants: Mapping[str, int]
    structs: Mapping[str, type[ctypes.Structure]]
    functions: Mapping[str, Function]


def read_headers(*paths: Path) -> Header:
    """Read headers, each of which may use what earlier ones state.

    Raises:
        HeaderError: with what is not understood.
    """
    constants: dict[str, int] = {}
    structs: dict[str, type[ctypes.Structure]] = {}
    functions: dict[str, Function] = {}
    types: dict[str, Any] = dict(_NUMBERS)
    for path in paths:
        text = _COMMENT.sub("", path.read_text())
        for name, expression, macro, number in _CONSTANT.findall(text):
            constants[name or macro] = _evaluate(expression or number, constants)
        types.update({name: _known(kind, types) for kind, name in _ALIAS.findall(text) if kind != "struct"})
        for body, name in _STRUCT.findall(text):
            structs[name] = types[name] = _struct(name, body, types, constants)
        for result, name, arguments in _FUNCTION.findall(text):
            declared = [part.strip() for part in arguments.split(",") if part.strip() not in ("", "void")]
            taken = tuple(_type(re.sub(r"\b\w+$", "", part), types) for part in declared)
            functions[name] = Function(_type(result, types), taken)
        _check_rest(path, text)
    return Header(constants, structs, functions)


def _evaluate(expression: str, names: Mapping[str, int]) -> int:
    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        raise HeaderError(f"not an integer expression over earlier constants: {expression}")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise HeaderError(f"not an expression: {expression}") from error


def _struct(name: str, body: str, types: Mapping[str, Any], constants: Mapping[str, int]) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = []
    for line in filter(None, map(str.strip, body.split(";"))):
        match = _FIELD.fullmatch(line)
        if match is None:
            raise HeaderError(f"{name}: not a field: {line}")
        kind, pointer, field, length = match.groups()
        ctype = ctypes.c_void_p if pointer else _known(kind, types)
        fields.append((field, ctype * _evaluate(length, constants) if length else ctype))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _known(name: str, types: Mapping[str, Any]) -> Any:
    if name not in types:
        raise HeaderError(f"unknown type {name!r}")
    return types[name]


def _type(text: str, types: Mapping[str, Any]) -> Any:
    """Of an argument or a result: a number, a pointer to a struct, or any other pointer."""
    name = text.replace("const", "").strip()
    if not name.endswith("*"):
        return _known(name, types)
    target = name.rstrip("* ")
    if target == "char":
        return ctypes.c_char_p
    is_struct = isinstance(types.get(target), type) and issubclass(types[target], ctypes.Structure)
    return ctypes.POINTER(types[target]) if is_struct else ctypes.c_void_p


def _check_rest(path: Path, text: str) -> None:
    """Nothing may be left that would make Python and the compiler read a header differently."""
    for pattern in (_CONSTANT, _STRUCT, _ALIAS, _FUNCTION, _IGNORED):
        text = pattern.sub("", text)
    if rest := text.split():
        raise HeaderError(f"{path.name}: not understood: {' '.join(rest[:12])}")
