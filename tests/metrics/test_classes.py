"""Pieces of the scores of class-conditional models; the scores themselves are tested by the audit."""

import math

import pytest
import torch

from expunge.metrics.classes import entropy, first


def test_entropy():
    rows = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [math.nan] * 4])
    assert entropy(rows)[:3].tolist() == pytest.approx([math.log(4), 0, math.log(2)])
    assert entropy(rows)[3].isnan()


def test_first_of_each_class():
    labels = torch.tensor([2, 0, 2, 2, 0, 1])
    assert first(labels, 2).tolist() == [True, True, True, False, True, True]
    assert first(labels, 1).sum() == 3
