from . import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
    WORKER_ROLE_MIXED: _ClassVar[WorkerRole]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
WORKER_ROLE_MIXED: WorkerRole

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "reservation")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceRequest
    reservation: KvReservation
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceRequest, _Mapping]] = ..., reservation: _Optional[_Union[KvReservation, _Mapping]] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("first_token", "handed_off")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HANDED_OFF_FIELD_NUMBER: _ClassVar[int]
    first_token: _common_pb2.SequenceOutput
    handed_off: HandedOff
    def __init__(self, first_token: _Optional[_Union[_common_pb2.SequenceOutput, _Mapping]] = ..., handed_off: _Optional[_Union[HandedOff, _Mapping]] = ...) -> None: ...

class HandedOff(_message.Message):
    __slots__ = ("num_bytes", "transfer_s", "transport")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    transfer_s: float
    transport: str
    def __init__(self, num_bytes: _Optional[int] = ..., transfer_s: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("sequence", "local_prefill")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceRequest
    local_prefill: bool
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceRequest, _Mapping]] = ..., local_prefill: _Optional[bool] = ...) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("reserved", "output")
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    reserved: KvReservation
    output: _common_pb2.SequenceOutput
    def __init__(self, reserved: _Optional[_Union[KvReservation, _Mapping]] = ..., output: _Optional[_Union[_common_pb2.SequenceOutput, _Mapping]] = ...) -> None: ...

class KvReservation(_message.Message):
    __slots__ = ("reservation_id", "provenance", "num_cached_tokens", "endpoints")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    provenance: Provenance
    num_cached_tokens: int
    endpoints: _containers.RepeatedCompositeFieldContainer[RankEndpoint]
    def __init__(self, reservation_id: _Optional[str] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., num_cached_tokens: _Optional[int] = ..., endpoints: _Optional[_Iterable[_Union[RankEndpoint, _Mapping]]] = ...) -> None: ...

class Provenance(_message.Message):
    __slots__ = ("request_id", "epoch", "model_fingerprint", "prefix_hash", "num_tokens", "dtype")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    model_fingerprint: str
    prefix_hash: bytes
    num_tokens: int
    dtype: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., prefix_hash: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class RankEndpoint(_message.Message):
    __slots__ = ("rank", "address", "host_id", "kv_range")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    KV_RANGE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    address: str
    host_id: str
    kv_range: KvRange
    def __init__(self, rank: _Optional[int] = ..., address: _Optional[str] = ..., host_id: _Optional[str] = ..., kv_range: _Optional[_Union[KvRange, _Mapping]] = ...) -> None: ...

class KvRange(_message.Message):
    __slots__ = ("layer_start", "layer_end", "head_start", "head_end")
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    HEAD_END_FIELD_NUMBER: _ClassVar[int]
    layer_start: int
    layer_end: int
    head_start: int
    head_end: int
    def __init__(self, layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ..., head_start: _Optional[int] = ..., head_end: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("min_interval_ms",)
    MIN_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    min_interval_ms: int
    def __init__(self, min_interval_ms: _Optional[int] = ...) -> None: ...

class WorkerSnapshot(_message.Message):
    __slots__ = ("worker_id", "role", "draining", "num_running", "num_waiting", "num_queued_tokens", "num_total_blocks", "num_free_blocks", "max_num_seqs", "num_finished", "num_preemptions", "num_provenance_failures", "num_generated_tokens", "num_prefix_cache_hit_tokens", "num_prefix_cache_query_tokens", "cached_prefixes", "step_time_s", "num_leaked_blocks")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROVENANCE_FAILURES_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_CACHE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_CACHE_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PREFIXES_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_LEAKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: WorkerRole
    draining: bool
    num_running: int
    num_waiting: int
    num_queued_tokens: int
    num_total_blocks: int
    num_free_blocks: int
    max_num_seqs: int
    num_finished: int
    num_preemptions: int
    num_provenance_failures: int
    num_generated_tokens: int
    num_prefix_cache_hit_tokens: int
    num_prefix_cache_query_tokens: int
    cached_prefixes: _containers.RepeatedScalarFieldContainer[int]
    step_time_s: float
    num_leaked_blocks: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., draining: _Optional[bool] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_queued_tokens: _Optional[int] = ..., num_total_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., num_finished: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_provenance_failures: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., num_prefix_cache_hit_tokens: _Optional[int] = ..., num_prefix_cache_query_tokens: _Optional[int] = ..., cached_prefixes: _Optional[_Iterable[int]] = ..., step_time_s: _Optional[float] = ..., num_leaked_blocks: _Optional[int] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("num_left",)
    NUM_LEFT_FIELD_NUMBER: _ClassVar[int]
    num_left: int
    def __init__(self, num_left: _Optional[int] = ...) -> None: ...
