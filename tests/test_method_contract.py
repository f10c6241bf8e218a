"""What every method must leave, in every family it supports; and how it refuses the others (kdprune.testing)."""

from functools import partial
from typing import ClassVar

import pytest
from families import CONFIGS, build
from methods import FORMS, REFUSED, STOCK, quick

from kdprune.testing import MethodContract
from kdprune.testing.method import MethodCase

pytestmark = pytest.mark.usefixtures("one_thread")


class TestMethods(MethodContract):
    """Every method, in every form, in every family it supports."""

    methods: ClassVar = {form: partial(quick, form) for form in FORMS}
    models: ClassVar = {name: partial(build, name) for name in CONFIGS}
    refused: ClassVar = {form: REFUSED.get(name, {}) for form, (name, _) in FORMS.items()}

    def test_it_is_finite_and_smaller_by_the_ratio(self, case: MethodCase) -> None:
        super().test_it_is_finite_and_smaller_by_the_ratio(case)
        assert (type(case.pruned.model) is type(case.pruned.dense)) == (case.method in STOCK)
