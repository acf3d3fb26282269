"""Batches: ragged ones, padding, what is refused, and routers that stay balanced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evermind_manifests.errors import InputError

from evermind_pack.models import EvermindLM
from evermind_pack.training import LmTrainer, LmTrainerOptions

CONFIG = {"vocabSize": 13, "dModel": 8, "numLayers": 2, "hiddenDim": 12, "numExperts": 4, "seed": 3}
RAGGED = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [4], [10, 11]]


def test_each_sequence_weighs_the_same_whatever_its_length():
    trainer = _trainer()
    together = trainer.losses(RAGGED)
    alone = [trainer.losses([sequence]).loss.item() for sequence in RAGGED if len(sequence) > 1]
    assert together.loss.item() == pytest.approx(np.mean(alone), rel=1e-12)
    assert together.items == 5 + 2 + 1


def test_padding_does_not_count_for_the_balance():
    trainer = _trainer()
    ragged = trainer.losses([[1, 2, 3], [7] * 9]).aux_loss.item()
    # Of each sequence all positions but the last, which predicts nothing.
    assert ragged == pytest.approx(_aux_of_positions(trainer, [[1, 2], [7] * 8]), rel=1e-12)
    padded = _aux_of_positions(trainer, [[1, 2, 0, 0, 0, 0, 0, 0], [7] * 8])
    assert ragged != pytest.approx(padded, rel=1e-3)


def test_batch_gradient_is_the_mean_of_single_ones():
    usable = [sequence for sequence in RAGGED if len(sequence) > 1]
    trainer = _trainer(aux_weight=0.0)
    trainer.losses(RAGGED).total.backward()
    together = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    for sequence in usable:
        (trainer.losses([sequence]).total / len(usable)).backward()
    for one, parameter in zip(together, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_loss_includes_balancing_with_its_weight():
    with_aux, without = (_trainer(aux_weight=w).losses(RAGGED) for w in (0.5, 0.0))
    gap = with_aux.total.item() - without.total.item()
    assert gap == pytest.approx(0.5 * with_aux.aux_loss.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("batch", "named"), [([[1]], "2 tokens"), ([[1, 13]], "0 to 12"), ([[-1, 2]], "0 to 12")]
)
def test_refuses_batches_without_use(batch, named):
    with pytest.raises(InputError, match=named):
        _trainer().losses(batch)


def test_balancing_keeps_routers_from_collapsing():
    # A router pushed hard towards two experts: without the loss it stays there.
    tokens = np.random.default_rng(0).integers(0, 13, (8, 12))

    def loads(aux_weight: float) -> float:
        trainer = _trainer(aux_weight=aux_weight, lr=0.02)
        with torch.no_grad():
            for layer in trainer.model.layers:
                layer.norm_moe.weight.fill_(1)
                layer.moe.router.weight[:2] += 0.5
                layer.moe.router.weight[2:] -= 0.5
            trainer.model.token_embedding.weight += 0.5
        reports = [trainer.step(tokens) for _ in range(60)]
        assert reports[0].peak_load > 1.9
        return reports[-1].peak_load

    assert loads(0.0) > 1.8
    assert loads(0.2) < 1.5


def test_options_may_change_between_steps():
    trainer = _trainer(lr=0.1)
    assert trainer.step(RAGGED).lr == 0.1
    trainer.options = LmTrainerOptions(lr=0.0, weight_decay=0.5)
    before = trainer.model.to_tensors()
    assert trainer.step(RAGGED).step == 2
    for name, value in trainer.model.to_tensors().items():
        assert value.tobytes() == before[name].tobytes()


def _trainer(**options) -> LmTrainer:
    return LmTrainer(EvermindLM(CONFIG).double(), LmTrainerOptions(**options))


def _aux_of_positions(trainer: LmTrainer, contexts: list[list[int]]) -> float:
    """The loss from its definition, over exactly these positions."""
    layers = [[] for _ in range(CONFIG["numLayers"])]
    for context in contexts:
        for layer, routes in zip(
            layers, trainer.model(torch.tensor([context])).routes, strict=True
        ):
            layer.append(routes)
    values = []
    for routes in layers:
        probs = torch.cat([r.probs[0] for r in routes])
        experts = torch.cat([r.experts[0] for r in routes])
        share = torch.bincount(experts.flatten(), minlength=4).double() / experts.numel()
        values.append((4 * (share * probs.mean(0)).sum()).item())
    return float(np.mean(values))
