from . import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_STARTING: _ClassVar[ReplicaState]
    REPLICA_STATE_READY: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_FAILED: _ClassVar[ReplicaState]
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_STARTING: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_FAILED: ReplicaState

class PoolTarget(_message.Message):
    __slots__ = ("role", "num_replicas", "tensor_parallel_size", "pipeline_parallel_size")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    role: _worker_pb2.WorkerRole
    num_replicas: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    def __init__(self, role: _Optional[_Union[_worker_pb2.WorkerRole, str]] = ..., num_replicas: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., pipeline_parallel_size: _Optional[int] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("worker_id", "role", "state", "address", "node", "pids", "num_restarts", "age_s", "snapshot", "message", "loaded_bytes", "total_bytes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _worker_pb2.WorkerRole
    state: ReplicaState
    address: str
    node: str
    pids: _containers.RepeatedScalarFieldContainer[int]
    num_restarts: int
    age_s: float
    snapshot: _worker_pb2.WorkerSnapshot
    message: str
    loaded_bytes: int
    total_bytes: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_worker_pb2.WorkerRole, str]] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., pids: _Optional[_Iterable[int]] = ..., num_restarts: _Optional[int] = ..., age_s: _Optional[float] = ..., snapshot: _Optional[_Union[_worker_pb2.WorkerSnapshot, _Mapping]] = ..., message: _Optional[str] = ..., loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("model", "version", "target", "replicas", "uptime_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    target: _containers.RepeatedCompositeFieldContainer[PoolTarget]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    uptime_s: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., target: _Optional[_Iterable[_Union[PoolTarget, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., uptime_s: _Optional[float] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetTargetRequest(_message.Message):
    __slots__ = ("sizes", "wait")
    class PoolSize(_message.Message):
        __slots__ = ("role", "num_replicas")
        ROLE_FIELD_NUMBER: _ClassVar[int]
        NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
        role: _worker_pb2.WorkerRole
        num_replicas: int
        def __init__(self, role: _Optional[_Union[_worker_pb2.WorkerRole, str]] = ..., num_replicas: _Optional[int] = ...) -> None: ...
    SIZES_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    sizes: _containers.RepeatedCompositeFieldContainer[SetTargetRequest.PoolSize]
    wait: bool
    def __init__(self, sizes: _Optional[_Iterable[_Union[SetTargetRequest.PoolSize, _Mapping]]] = ..., wait: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_left",)
    NUM_LEFT_FIELD_NUMBER: _ClassVar[int]
    num_left: int
    def __init__(self, num_left: _Optional[int] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
