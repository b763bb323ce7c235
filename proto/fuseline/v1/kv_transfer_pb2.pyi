from . import common_pb2 as _common_pb2
from . import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Refusal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_UNSPECIFIED: _ClassVar[Refusal]
    REFUSAL_LATE: _ClassVar[Refusal]
    REFUSAL_STALE: _ClassVar[Refusal]
    REFUSAL_MISMATCH: _ClassVar[Refusal]
    REFUSAL_OUT_OF_RANGE: _ClassVar[Refusal]
    REFUSAL_TRUNCATED: _ClassVar[Refusal]
    REFUSAL_CORRUPT: _ClassVar[Refusal]
REFUSAL_UNSPECIFIED: Refusal
REFUSAL_LATE: Refusal
REFUSAL_STALE: Refusal
REFUSAL_MISMATCH: Refusal
REFUSAL_OUT_OF_RANGE: Refusal
REFUSAL_TRUNCATED: Refusal
REFUSAL_CORRUPT: Refusal

class PushRequest(_message.Message):
    __slots__ = ("attach", "parcel_id", "pieces", "inline", "segment_offset")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    PARCEL_ID_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    attach: AttachSegment
    parcel_id: int
    pieces: _containers.RepeatedCompositeFieldContainer[KvPiece]
    inline: bytes
    segment_offset: int
    def __init__(self, attach: _Optional[_Union[AttachSegment, _Mapping]] = ..., parcel_id: _Optional[int] = ..., pieces: _Optional[_Iterable[_Union[KvPiece, _Mapping]]] = ..., inline: _Optional[bytes] = ..., segment_offset: _Optional[int] = ...) -> None: ...

class AttachSegment(_message.Message):
    __slots__ = ("pid", "fd", "name", "num_bytes")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    name: str
    num_bytes: int
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., name: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class KvPiece(_message.Message):
    __slots__ = ("reservation_id", "epoch", "provenance", "layer", "head_start", "head_end", "token_start", "token_end", "num_bytes", "checksum")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    HEAD_END_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    epoch: int
    provenance: int
    layer: int
    head_start: int
    head_end: int
    token_start: int
    token_end: int
    num_bytes: int
    checksum: int
    def __init__(self, reservation_id: _Optional[str] = ..., epoch: _Optional[int] = ..., provenance: _Optional[int] = ..., layer: _Optional[int] = ..., head_start: _Optional[int] = ..., head_end: _Optional[int] = ..., token_start: _Optional[int] = ..., token_end: _Optional[int] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("parcel_id", "refused", "attached")
    class Refused(_message.Message):
        __slots__ = ("index", "reason", "message")
        INDEX_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        index: int
        reason: Refusal
        message: str
        def __init__(self, index: _Optional[int] = ..., reason: _Optional[_Union[Refusal, str]] = ..., message: _Optional[str] = ...) -> None: ...
    PARCEL_ID_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    parcel_id: int
    refused: _containers.RepeatedCompositeFieldContainer[PushResponse.Refused]
    attached: bool
    def __init__(self, parcel_id: _Optional[int] = ..., refused: _Optional[_Iterable[_Union[PushResponse.Refused, _Mapping]]] = ..., attached: _Optional[bool] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("reservation_id", "provenance", "first_token")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    provenance: _worker_pb2.Provenance
    first_token: _common_pb2.SequenceOutput
    def __init__(self, reservation_id: _Optional[str] = ..., provenance: _Optional[_Union[_worker_pb2.Provenance, _Mapping]] = ..., first_token: _Optional[_Union[_common_pb2.SequenceOutput, _Mapping]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("reservation_id", "reason")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    reason: str
    def __init__(self, reservation_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
