"""Pure-torch stand-in for SGLang's compiled `sgl_kernel`, for runs on a CPU only.

SGLang imports a handful of *_cpu names at module level once SGLANG_USE_CPU_ENGINE=1. No
torch.ops.sgl_kernel operators are registered, so cpu_has_amx_support() is False and every layer takes its
forward_native path.
"""

__version__ = "0.0.0+torch"


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    at = 0
    for request, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist()):
        req_to_token[request, first:last] = out_cache_loc[at : at + last - first].to(req_to_token.dtype)
        at += last - first


def __getattr__(name):
    # Names of speculative decoding and the like: importable, not callable.
    if name.endswith("_cpu"):

        def missing(*args, **kwargs):
            raise NotImplementedError(f"sgl_kernel.{name} has no pure-torch version here")

        missing.__name__ = name
        return missing
    raise AttributeError(name)
