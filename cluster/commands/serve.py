"""``fuseline serve``: start a cluster on this machine or in a Ray cluster, and serve it until told to stop."""

from __future__ import annotations

from typing import Annotated

import typer

from ...runtime.sharding import ParallelConfig
from ..cluster_config import DEFAULT_PORT, ClusterConfig, EngineLimits, PoolConfig, check_num_replicas
from .common import reporting

_LIMITS = EngineLimits()
_CONFIG = ClusterConfig()


@reporting
def serve(
    model: Annotated[str, typer.Argument(help='"demo", a folder, or a name on the Hugging Face hub.')],
    prefill: Annotated[
        int, typer.Option(help="Prefill replicas; with 0, decode replicas do everything.")
    ] = _CONFIG.prefill.num_replicas,
    decode: Annotated[int, typer.Option(help="Decode replicas.")] = _CONFIG.decode.num_replicas,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", help="Ranks per layer.")] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", help="Pipeline stages.")
    ] = 1,
    prefill_tensor_parallel_size: Annotated[int | None, typer.Option(help="Instead of the common one.")] = None,
    prefill_pipeline_parallel_size: Annotated[int | None, typer.Option(help="Instead of the common one.")] = None,
    decode_tensor_parallel_size: Annotated[int | None, typer.Option(help="Instead of the common one.")] = None,
    decode_pipeline_parallel_size: Annotated[int | None, typer.Option(help="Instead of the common one.")] = None,
    num_cpus_per_rank: Annotated[float | None, typer.Option(help="Ray's CPU account of each rank.")] = None,
    served_model_name: Annotated[str, typer.Option(help="What clients call the model.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = _CONFIG.dtype,
    quantization: Annotated[
        str,
        typer.Option(
            "--quantization",
            "-q",
            help="Of linear layers: int8, int4, int4_g64, int4_g128 round them; none; auto is the checkpoint's.",
        ),
    ] = _CONFIG.quantization,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="int8, or auto for that of the weights.")
    ] = _CONFIG.kv_cache_dtype,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _CONFIG.device,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Most tokens of a sequence; the model's own by default."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.")] = _LIMITS.block_size,
    num_gpu_blocks_override: Annotated[
        int | None, typer.Option(help="KV blocks per worker, on a CPU too; by default what memory allows.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Share the KV of equal prefixes.")
    ] = _LIMITS.enable_prefix_caching,
    max_num_seqs: Annotated[
        int, typer.Option(help="Most sequences that an engine runs at once.")
    ] = _LIMITS.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Token budget of an engine's step.")
    ] = _LIMITS.max_num_batched_tokens,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Fraction of a GPU's memory to use.")
    ] = _LIMITS.gpu_memory_utilization,
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = _CONFIG.host,
    grpc_port: Annotated[int, typer.Option(help="0 lets the system choose.")] = DEFAULT_PORT,
    ray_address: Annotated[
        str, typer.Option(help="A Ray cluster to join; empty starts a private one.")
    ] = _CONFIG.ray_address,
    bind_node_address: Annotated[
        bool,
        typer.Option("--bind-node-address", help="Workers listen beyond loopback."),
    ] = False,
    allow_cross_node_tp: Annotated[
        bool,
        typer.Option("--allow-cross-node-tp", help="Tensor ranks may straddle nodes."),
    ] = False,
    start_timeout: Annotated[
        float, typer.Option(help="Seconds for a replica to get ready.")
    ] = _CONFIG.start_timeout_s,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds for requests to finish on a replica that leaves.")
    ] = _CONFIG.drain_timeout_s,
) -> None:
    """Serve a model until Ctrl-C.

    The first Ctrl-C lets requests finish for a while and clears everything away, the second one ends at once.
    """
    check_num_replicas("prefill", prefill, 0)
    check_num_replicas("decode", decode, 1)
    config = ClusterConfig(
        model=model,
        served_name=served_model_name,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        device=device,
        prefill=PoolConfig(
            prefill,
            ParallelConfig(
                _first(prefill_tensor_parallel_size, tensor_parallel_size),
                _first(prefill_pipeline_parallel_size, pipeline_parallel_size),
            ),
            num_cpus_per_rank,
        ),
        decode=PoolConfig(
            decode,
            ParallelConfig(
                _first(decode_tensor_parallel_size, tensor_parallel_size),
                _first(decode_pipeline_parallel_size, pipeline_parallel_size),
            ),
            num_cpus_per_rank,
        ),
        limits=EngineLimits(
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_gpu_blocks_override,
            enable_prefix_caching=enable_prefix_caching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
        ),
        host=host,
        port=grpc_port,
        ray_address=ray_address,
        bind_node_address=bind_node_address,
        allow_cross_node_tp=allow_cross_node_tp,
        start_timeout_s=start_timeout,
        drain_timeout_s=drain_timeout,
    )
    from ..serving import run_cluster

    run_cluster(config, typer.echo)


def _first(own: int | None, common: int) -> int:
    return common if own is None else own
