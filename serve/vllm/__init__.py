"""Decoder replicas whose kernels are vLLM's (`serve.backend=vllm`).

vLLM pins a torch of its own, so nothing of it is imported: a replica starts its server as a child,
in the environment of `serve.vllm_python`, and speaks HTTP with it.
"""
