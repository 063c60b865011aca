"""Some of the bad inputs of bad_inputs.py, a few of each kind: each is one error, and none is accepted in silence."""

from collections import defaultdict
from pathlib import Path

import pytest

from tests.bad_inputs import Case, all_cases, outcome

OF_A_KIND = 6


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, list[Case]]:
    by_kind = defaultdict(list)
    for case in all_cases(tmp_path_factory.mktemp("inputs")):
        by_kind[case.kind].append(case)
    return by_kind


def test_there_are_more_than_600_bad_inputs(cases):
    assert sum(map(len, cases.values())) > 600


KINDS = ("flags", "names", "prompts", "model folders", "weights", "lora", "rewards", "methods")
KINDS += ("run folders", "checkpoints", "evaluations")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_input_is_an_error_that_names_it(kind, cases, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    step = max(1, len(cases[kind]) // OF_A_KIND)
    for case in cases[kind][step // 2 :: step]:
        assert outcome(case) == "", case
