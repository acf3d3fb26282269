"""Configurations: defaults, what is kept, what is refused."""

from __future__ import annotations

import pytest
from evermind_exporters.checkpoints import validate_config
from evermind_manifests.errors import ConfigError


@pytest.mark.parametrize(
    ("case", "family"),
    [
        ("moe_default", "shared-expert-moe"),
        ("moe_small", "shared-expert-moe"),
        ("lm_default", "evermind-lm"),
        ("limbic_default", "limbic"),
        ("limbic_small", "limbic"),
    ],
)
def test_defaults_are_the_peers(golden, case, family):
    json = golden(case).json
    assert validate_config(family, json["config"]) == json["resolved_config"]


def test_the_lm_hidden_size_follows_its_width():
    config = validate_config("evermind-lm", {"vocabSize": 10, "dModel": 48})
    assert config["hiddenDim"] == 96


def test_seed_and_unknown_keys_are_kept_after_the_dimensions():
    config = validate_config("shared-expert-moe", {"note": "x", "seed": -1, "topK": 1})
    assert list(config) == ["modelDim", "hiddenDim", "numExperts", "topK", "note", "seed"]
    assert config["seed"] == -1


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        ("evermind-lm", {}, "vocabSize"),
        ("evermind-lm", {"vocabSize": 0}, "vocabSize"),
        ("evermind-lm", {"vocabSize": 4, "topK": 5}, "topK"),
        ("evermind-lm", {"vocabSize": 4, "numLayers": 10**6, "numExperts": 10**6}, "tensors"),
        ("shared-expert-moe", {"topK": 0}, "topK"),
        ("shared-expert-moe", {"topK": 1.5}, "topK"),
        ("shared-expert-moe", {"modelDim": True}, "modelDim"),
        ("shared-expert-moe", {"modelDim": "64"}, "modelDim"),
        ("shared-expert-moe", {"hiddenDim": 2**32}, "hiddenDim"),
        ("shared-expert-moe", {"seed": "7"}, "seed"),
        ("limbic", {"hiddenDim": 65}, "hiddenDim"),
        ("limbic", {"rewardWeight": float("nan")}, "rewardWeight"),
        ("transformer", {}, "family"),
    ],
)
def test_refuses_and_names_the_key(family, config, named):
    with pytest.raises(ConfigError, match=named):
        validate_config(family, config)
