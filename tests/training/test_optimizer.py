"""Learning rates, clipping and options."""

from __future__ import annotations

import math

import pytest
import torch
from evermind_manifests.errors import ConfigError

from evermind_pack.training import LmTrainerOptions, MoeTrainerOptions, learning_rate
from evermind_pack.training.optimizer import OptimizerOptions, clip_gradients


def test_constant_rate_after_warmup():
    options = OptimizerOptions(lr=0.4, warmup_steps=4)
    assert [learning_rate(options, step) for step in range(1, 7)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )


def test_cosine_falls_from_the_peak_to_zero():
    options = OptimizerOptions(lr=1.0, schedule="cosine", warmup_steps=2, total_steps=12)
    rates = [learning_rate(options, step) for step in range(1, 14)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[12] == pytest.approx(0.0)
    assert 0 < rates[11] < 0.03


def test_clipping_scales_to_the_limit_exactly_and_only_above_it():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    for limit, expected in ((10.0, [3.0, 0.0, 4.0]), (1.0, [0.6, 0.0, 0.8]), (None, [3.0, 0, 4.0])):
        parameters[0].grad = torch.tensor([3.0, 0.0])
        parameters[1].grad = torch.tensor([4.0])
        assert clip_gradients(parameters, limit) == 5.0
        assert torch.cat([p.grad for p in parameters]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"beta2": 1.0}, "beta2"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"schedule": "linear"}, "schedule"),
        ({"schedule": "cosine"}, "total_steps"),
        ({"schedule": "cosine", "warmup_steps": 5, "total_steps": 5}, "total_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_refuses_options_that_cannot_be(options, named):
    with pytest.raises(ConfigError, match=named):
        LmTrainerOptions(**options)


def test_balancing_is_right_unless_the_peers_quirk_is_asked_for():
    assert MoeTrainerOptions().aux_scale == "mean"
    with pytest.raises(ConfigError, match="aux_scale"):
        MoeTrainerOptions(aux_scale="sum")
