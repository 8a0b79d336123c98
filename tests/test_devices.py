"""Which devices a run of tests sees."""

import pytest
import torch

from tests.conftest import asks_for_gpu_tests


@pytest.mark.parametrize(
    ("expression", "asks"),
    [
        ("gpu", True),
        ("sanitize", True),
        ("gpu and not sanitize", True),
        ("gpu and not slow", True),
        ("", False),
        ("not slow and not gpu and not paper", False),
        ("slow or paper", False),
        ("gpu or slow", False),
    ],
)
def test_a_marker_expression_asks_for_gpu_tests_if_it_selects_no_others(expression, asks):
    assert asks_for_gpu_tests(expression) == asks


def test_other_tests_see_no_gpu():
    assert not torch.cuda.is_available()
