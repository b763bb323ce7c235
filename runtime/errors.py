"""Typed errors of Fuseline, one class per thing a caller can do about it.

Each class maps to exactly one canonical gRPC status code by name (``code``), so that the wire layer needs no table
of its own; ``details`` carries the offending field, value and limit as strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class ErrorCode(StrEnum):
    """Names of the canonical gRPC status codes that Fuseline uses."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


class FuselineError(Exception):
    """Base of every error that Fuseline raises on purpose.

    Args:
        message: what is wrong, with the offending value and the limit, for a person to read.
        details: the same facts by name, for a program to read.
    """

    code: ErrorCode = ErrorCode.INTERNAL

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, str] = {name: str(value) for name, value in details.items()}


class InvalidArgumentError(FuselineError, ValueError):
    """A request or configuration value is out of range or malformed; retrying it unchanged cannot help."""

    code = ErrorCode.INVALID_ARGUMENT


class NotFoundError(FuselineError, LookupError):
    """A named thing (model, worker, request) does not exist."""

    code = ErrorCode.NOT_FOUND


class AlreadyExistsError(FuselineError):
    """The name (request id, reservation) is in use."""

    code = ErrorCode.ALREADY_EXISTS


class ModelFormatError(FuselineError):
    """A checkpoint or its configuration is missing, corrupted, inconsistent, or cannot be sharded as asked."""

    code = ErrorCode.FAILED_PRECONDITION


class ResourceExhaustedError(FuselineError):
    """Too few blocks, slots, CPUs or GPUs for what was asked; the same request may fit later or elsewhere."""

    code = ErrorCode.RESOURCE_EXHAUSTED


class UnavailableError(FuselineError):
    """A peer is gone or not ready; another replica, or the same one later, may serve the request."""

    code = ErrorCode.UNAVAILABLE


class DeadlineExceededError(FuselineError, TimeoutError):
    """The request's deadline passed before it was done."""

    code = ErrorCode.DEADLINE_EXCEEDED


class CancelledError(FuselineError):
    """The caller went away or asked to stop. Not ``asyncio.CancelledError``: this one is an answer, not a signal."""

    code = ErrorCode.CANCELLED


class ProvenanceError(FuselineError):
    """KV bytes are not what they claim to be: wrong request, epoch, model, prefix, range, dtype or checksum."""

    code = ErrorCode.DATA_LOSS


class InternalError(FuselineError):
    """An invariant of Fuseline itself is broken: a bug, never the caller's fault."""

    code = ErrorCode.INTERNAL


ERROR_TYPES: dict[ErrorCode, type[FuselineError]] = {kind.code: kind for kind in FuselineError.__subclasses__()}
"""The error of each code, for the far end of a wire."""


def make_error(code: ErrorCode, message: str, details: Mapping[str, str] | None = None) -> FuselineError:
    """An error of the class that ``code`` belongs to; ``details`` may come from a peer and have any names."""
    error = ERROR_TYPES[code](message)
    error.details.update(details or {})
    return error
