"""Makes vLLM know pruned models: the function behind the entry point of group ``vllm.general_plugins``."""

from __future__ import annotations

from typing import Any

from .modeling_kdp import FAMILIES, Family, generated, refuse_layers_to_serve, refuse_to_serve, register

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register_vllm() -> None:
    """Register every ``KDP<X>ForCausalLM`` with vLLM, to be run by its Transformers backend.

    Families that this backend cannot run, and models with layers without attention, are registered to be refused, in
    one line and before an engine is started.
    vLLM calls this in each of its processes; it is safe to repeat. Raises ImportError where vLLM is absent.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register()
    known = set(ModelRegistry.get_supported_archs())
    for family in FAMILIES.values():
        name = generated(family, "ForCausalLM").__name__
        if name not in known:
            ModelRegistry.register_model(name, BACKEND)
        MODELS_CONFIG_MAP[name] = _refusal(family)


def _refusal(family: Family) -> type:
    """What vLLM asks about a model's config before it starts anything: it raises ValueError for what cannot run."""

    class Refusal:
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            refuse_to_serve(family)
            refuse_layers_to_serve(model_config.hf_config)

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            cls.verify_and_update_model_config(vllm_config.model_config)

    return Refusal
