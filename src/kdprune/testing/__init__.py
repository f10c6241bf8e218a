"""What authors of families and methods inherit: the contract that every pruned model keeps, as pytest classes.

A family, that is a row of the table in ``model/modeling_kdp.py``, is pruned by every kind of edit:

    from kdprune.testing import FamilyContract, with_random_weights

    class TestOlmo(FamilyContract):
        @staticmethod
        def model():  # six layers or more, an even number of key-value heads; the same weights at every call
            config = OlmoConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, vocab_size=64, …)
            return with_random_weights(OlmoForCausalLM(config))

A method is tried on models of several families; it may refuse some, which then says so in one line:

    from kdprune.testing import MethodContract

    class TestNothing(MethodContract):
        models = {"llama": tiny_llama, "gpt2": tiny_gpt2}
        refused = {"gpt2": "expected a norm"}

        @staticmethod
        def method():
            return Nothing(ratio=0.2)

pytest collects both as they are. For assertions that show their values put
``pytest.register_assert_rewrite("kdprune.testing")`` into ``conftest.py``. This package imports no pytest itself.
"""

from kdprune.testing.elsewhere import Elsewhere, load_elsewhere
from kdprune.testing.family import FamilyContract
from kdprune.testing.kinds import KINDS, context_edit, edits_of, random_stand_in, with_random_weights
from kdprune.testing.method import MethodContract, run_method
from kdprune.testing.models import CALIBRATION, IDS, close, logits_of, saved_and_loaded

__all__ = [
    "CALIBRATION", "IDS", "KINDS", "Elsewhere", "FamilyContract", "MethodContract", "close", "context_edit", "edits_of",
    "load_elsewhere", "logits_of", "random_stand_in", "run_method", "saved_and_loaded", "with_random_weights",
]
