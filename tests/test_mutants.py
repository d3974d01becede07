"""The faults of tests/mutants.py can be made: a change of the code they stand in must not pass them by."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.mutants import MUTANTS, ROOT, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_is_one_edit_of_code_that_is_there_and_its_tests_are(mutant):
    text, fault = (ROOT / mutant.file).read_text(), mutated(mutant)
    assert fault != text
    compile(fault, mutant.file, "exec")
    for word in mutant.tests.split():
        name, _, function = word.partition("::")
        file = ROOT / "tests" / f"{name.removesuffix('.py')}.py"
        assert not function or f"def {function}(" in file.read_text(), word
        assert file.exists(), word


def test_faults_have_names_of_their_own():
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
