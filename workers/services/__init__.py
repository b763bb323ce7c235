"""What a worker answers over gRPC: prefill, decode with the commit of a handoff, and its own state.

Handlers translate between RPCs, the engine's thread and the group's ranks; they decide nothing about scheduling. The
open stream is a request's lease: a handler's ``finally`` frees whatever the request holds here, in an order in which
no block comes free while a transfer may still touch it.
"""
