"""KV from prefill ranks to decode ranks: pieces with their provenance, over shared memory or gRPC.

``KvSender`` gathers pieces out of a paged cache and pushes them, ``KvReceiver`` checks them and writes them into
another; ``KvTransferServicer`` is the wire between. Layouts may differ in every way: tensor and pipeline sizes,
block size, block ids. The files, from the bottom: ``pieces`` (what is claimed of bytes), ``intervals``,
``cache_access`` (bytes in and out of a cache), ``wire`` and ``..segment`` (how they travel), ``receiver``,
``malloc`` and ``servicer`` (decode side), ``parcels``, ``ledger``, ``lane`` and ``sender`` (prefill side).
"""

from ..segment import host_id
from .ledger import KvSenderStats, TransferLimits
from .pieces import Piece, PieceRefusedError, Refusal, checksum, provenance_digest
from .receiver import KvReceiver, KvReceiverStats
from .sender import KvSender
from .servicer import KvTransferServicer

__all__ = [
    "KvReceiver",
    "KvReceiverStats",
    "KvSender",
    "KvSenderStats",
    "KvTransferServicer",
    "Piece",
    "PieceRefusedError",
    "Refusal",
    "TransferLimits",
    "checksum",
    "host_id",
    "provenance_digest",
]
