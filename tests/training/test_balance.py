"""The load-balancing loss: its values, its gradient, and the peer's missing factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evermind_pack.models import SharedExpertMoE
from evermind_pack.training import MoeBatch, MoeTrainer, MoeTrainerOptions
from evermind_pack.training.balance import load_balance_loss, peak_load


def test_values_at_the_extremes():
    even = torch.full((6, 4), 0.25)
    assert load_balance_loss(even, torch.tensor([[0, 1], [2, 3]] * 3)).item() == 1.0
    one = torch.zeros(6, 4)
    one[:, 2] = 1
    assert load_balance_loss(one, torch.full((6, 1), 2)).item() == 4.0
    assert load_balance_loss(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)).item() == 0
    assert peak_load(torch.tensor([[0, 1], [2, 3]]), 4) == 1.0
    assert peak_load(torch.tensor([[0, 1], [0, 1]]), 4) == 2.0


@pytest.mark.parametrize("name", ["moe_small", "moe_six", "moe_default"])
def test_value_is_the_peers(golden, name):
    case = golden(name).json
    rows = case["expected_f32"]
    loss = load_balance_loss(
        torch.tensor([row["probs"] for row in rows], dtype=torch.float64),
        torch.tensor([row["experts"] for row in rows]),
    )
    assert loss.item() == pytest.approx(case["load_balance_loss_f64"], rel=1e-6)


def test_gradient_takes_dispatch_as_constant():
    # d/dlogit_j of E * sum_e f_e * mean(p_e) = E/N * p_j * (f_j - sum_e f_e p_e).
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    probs = torch.softmax(logits, -1)
    experts = logits.topk(2).indices
    load_balance_loss(probs, experts).backward()
    f = torch.bincount(experts.flatten(), minlength=4) / 10
    p = probs.detach()
    expected = 4 / 5 * p * (f - (p * f).sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected)


def test_mean_scale_does_not_depend_on_the_batch_size_and_peer_fades():
    # A batch repeated n times has the same mean losses: so must be the gradient, except
    # that the peer divides the balancing part by the batch size once more.
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(2, 3, 6))

    def router_gradient(copies: int, aux_weight: float, scale: str) -> torch.Tensor:
        model = SharedExpertMoE({"modelDim": 6, "hiddenDim": 4, "numExperts": 4}).double()
        options = MoeTrainerOptions(aux_weight=aux_weight, aux_scale=scale)
        batch = MoeBatch(np.tile(x, (copies, 1)), np.tile(target, (copies, 1)))
        MoeTrainer(model, options).losses(batch).total.backward()
        return model.router.weight.grad

    task = router_gradient(1, 0.0, "mean")
    balance = router_gradient(1, 1.0, "mean") - task
    assert balance.abs().max() > 1e-6
    torch.testing.assert_close(router_gradient(7, 1.0, "mean"), task + balance)
    torch.testing.assert_close(router_gradient(7, 1.0, "peer"), task + balance / 21)
