"""Makes vLLM know pruned models: the function behind the entry point of group ``vllm.general_plugins``."""

from __future__ import annotations

from .modeling_kdp import FAMILIES, generated, register

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register_vllm() -> None:
    """Register every ``KDP<X>ForCausalLM`` with vLLM, to be run by its Transformers backend.

    vLLM calls this in each of its processes; it is safe to repeat. Raises ImportError where vLLM is absent.
    """
    from vllm import ModelRegistry

    register()
    known = set(ModelRegistry.get_supported_archs())
    for family in FAMILIES.values():
        name = generated(family, "ForCausalLM").__name__
        if name not in known:
            ModelRegistry.register_model(name, BACKEND)
