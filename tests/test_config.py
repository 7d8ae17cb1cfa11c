"""Configs are data, checked when made: round trips, and errors that say expected, got and remedy."""

import dataclasses
import json

import pytest

import jaxwalk as jw
from jaxwalk.config import (
    CheckpointConfig,
    ConfigError,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MeshConfig,
    MLPConfig,
    ModelConfig,
    OptimConfig,
    TextData,
    TrainConfig,
    WorldData,
    YarnScaling,
    from_dict,
    to_dict,
)

MODEL = ModelConfig(
    vocab_size=3,
    max_length=8,
    aggregate=("causal_mean", jw.aggregates.config("attention", heads=2, window=3)),
    filter=(MLPConfig(gated=True, activation="silu"), None),
)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(vocab_size=3, max_length=8),
        MODEL,
        jw.model.resolve(MODEL),
        dataclasses.replace(MODEL, filter=None, aggregate=jw.aggregates.config("fixed_mixing")),
        TrainConfig(name="w", model=MODEL, data=WorldData("mess3", {"x": 0.1, "deep": {"a": [1, 2]}})),
        TrainConfig(name="t", model=MODEL, data=TextData(tokenizer="bpe", vocab_size=300), seed=7),
    ],
)
def test_round_trip_through_json(config):
    data = json.loads(json.dumps(to_dict(config)))
    again = from_dict(type(config), data)
    assert to_dict(again) == to_dict(config)
    if isinstance(config, ModelConfig):
        assert again == config


@pytest.mark.parametrize("name", jw.aggregates.names())
def test_every_aggregate_round_trips(name):
    config = dataclasses.replace(MODEL, aggregate=jw.aggregates.config(name))
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


SCALINGS = [
    LinearScaling(2.0),
    Llama3Scaling(8.0, 1.0, 4.0, 64),
    YarnScaling(4.0, 64, attention_factor=1.1, truncate=False),
    LongRopeScaling((1.0, 2.0), 1.2),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: type(s).__name__)
def test_every_rotary_scaling_round_trips(scaling):
    rope = jw.aggregates.config("attention", positions="rope", rope_scaling=scaling)
    config = dataclasses.replace(MODEL, aggregate=(rope, "attention"))
    data = json.loads(json.dumps(to_dict(config)))
    assert data["aggregate"][0]["rope_scaling"]["kind"] == type(scaling).__name__
    assert from_dict(ModelConfig, data) == config


def test_a_config_from_before_a_choice_is_todays_default():
    data = to_dict(MODEL)
    new = ("norm_unit_offset", "position_offset", "embed_scale", "embed_norm", "logit_softcap")
    old = {name: value for name, value in data.items() if name not in new}
    new = ("rope_width", "rope_scaling", "scale", "softcap", "qk_norm_over", "qk_norm_eps", "out_bias")
    old["aggregate"] = ["causal_mean", {k: v for k, v in data["aggregate"][1].items() if k not in new}]
    assert len(old["aggregate"][1]) == len(data["aggregate"][1]) - len(new)
    assert from_dict(ModelConfig, old) == MODEL


def test_a_resolved_config_names_every_layer():
    resolved = jw.model.resolve(MODEL)
    assert len(resolved.aggregate) == len(resolved.filter) == MODEL.depth
    assert all(isinstance(a, jw.aggregates.AggregateConfig) for a in resolved.aggregate)
    assert jw.model.resolve(resolved) == resolved


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.width = 3


IMPOSSIBLE = [
    (LinearScaling, {"factor": 0.5}, "factor: expected at least 1, got 0.5"),
    (
        Llama3Scaling,
        {"factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_length": 8},
        "more than",
    ),
    (YarnScaling, {"factor": 2.0, "original_length": 0}, "original_length: expected at least 1, got 0"),
    (YarnScaling, {"factor": 2.0, "original_length": 8, "beta_fast": 0.5}, "beta_fast: expected more than beta_slow"),
    (LongRopeScaling, {"factors": (1.0, 0.0)}, "factors: expected positive numbers"),
    (
        ModelConfig,
        {"vocab_size": 3, "max_length": 8, "norm_unit_offset": True},
        "expected norm = 'rms_norm', got 'layer",
    ),
    (ModelConfig, {"vocab_size": 3, "max_length": 8, "embed_scale": 0.0}, "embed_scale: expected more than 0, got 0"),
    (
        ModelConfig,
        {"vocab_size": 3, "max_length": 8, "norm": "rms_norm", "norm_scale": False},
        "norm_scale: expected norm = 'layer_norm' where there is none, got 'rms_norm'",
    ),
    (ModelConfig, {"vocab_size": 3, "max_length": 8, "logit_softcap": -1.0}, "logit_softcap: expected more than 0"),
    (
        ModelConfig,
        {"vocab_size": 3, "max_length": 8, "position_offset": 2, "positions": "none"},
        "position_offset: expected positions = 'learned', got 'none'",
    ),
    (ModelConfig, {"vocab_size": 0, "max_length": 8}, "vocab_size: expected at least 1, got 0"),
    (ModelConfig, {"vocab_size": "3", "max_length": 8}, "vocab_size: expected int, got '3'"),
    (ModelConfig, {"vocab_size": True, "max_length": 8}, "vocab_size: expected int, got True"),
    (ModelConfig, {"vocab_size": 3, "max_length": 8, "placement": "mid"}, "placement: expected .*'pre'.*, got 'mid'"),
    (ModelConfig, {"vocab_size": 3, "max_length": 8, "aggregate": ()}, "aggregate: expected a choice"),
    (ModelConfig, {"vocab_size": 3, "max_length": 8, "filter": (1,)}, r"filter: expected .*MLPConfig.*, got \(1,\)"),
    (ModelConfig, {"vocab_size": 3, "max_length": 8, "depth": -1}, "depth: expected at least 0, got -1"),
    (MLPConfig, {"hidden": 0}, "hidden: expected at least 1, got 0"),
    (MLPConfig, {"activation": "swish"}, "activation: expected Literal.*, got 'swish'"),
    (OptimConfig, {"lr": -1.0}, "lr: expected at least 0, got -1.0"),
    (OptimConfig, {"lr": float("nan")}, "lr: expected at least 0, got nan"),
    (OptimConfig, {"decay_share": 2.0}, "decay_share: expected a share between 0 and 1, got 2.0"),
    (OptimConfig, {"schedule": "linear"}, "schedule: expected Literal.*, got 'linear'"),
    (CheckpointConfig, {"latest": 0}, "latest: expected at least 1, got 0"),
    (MeshConfig, {"model": 0}, "model: expected at least 1, got 0"),
    (WorldData, {"params": 3}, "params: expected .*Mapping.*, got 3"),
    (TextData, {"validation": 1.0}, "validation: expected a share between 0 and 1, got 1.0"),
    (TextData, {"streaming": True}, "max_tokens: expected a number with streaming=True"),
    (TextData, {"vocab_size": 300}, "vocab_size: expected 257 with tokenizer='bytes', got 300"),
]


@pytest.mark.parametrize(("cls", "choices", "message"), IMPOSSIBLE)
def test_impossible_choices_raise(cls, choices, message):
    with pytest.raises(ConfigError, match=message):
        cls(**choices)
    with pytest.raises(ConfigError, match=message):
        from_dict(cls, choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"steps": 15}, "steps: expected a multiple of steps_per_call = 10, got 15"),
        ({"log_every": 5}, "log_every: expected a multiple of steps_per_call"),
        ({"checkpoint": CheckpointConfig(every=7)}, "checkpoint.every: expected a multiple of steps_per_call"),
        ({"batch_size": 9, "accumulate": 2}, "batch_size: expected a multiple of accumulate = 2, got 9"),
        ({"steps_per_call": 0}, "steps_per_call: expected at least 1, got 0"),
        ({"data": "mess3"}, "data: expected .*WorldData.*TextData, got 'mess3'"),
    ],
)
def test_a_run_that_cannot_be_raises(choices, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"name": "r", "model": MODEL, "data": WorldData(), **choices})


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError, match=r"ModelConfig: vocab_size: .*; max_length: .*; width: "):
        ModelConfig(vocab_size=0, max_length=0, width=0)


def test_unknown_and_missing_fields():
    with pytest.raises(ConfigError, match=r"unknown field of ModelConfig 'widht'. Did you mean 'width'\? Choices: agg"):
        from_dict(ModelConfig, {"vocab_size": 3, "max_length": 8, "widht": 4})
    with pytest.raises(ConfigError, match=r"ModelConfig: .*max_length.* Got fields vocab_size"):
        from_dict(ModelConfig, {"vocab_size": 3})
    with pytest.raises(ConfigError, match=r"unknown kind of config 'MLPConfg'. Did you mean 'MLPConfig'"):
        from_dict(ModelConfig, {"vocab_size": 3, "max_length": 8, "filter": {"kind": "MLPConfg"}})
    with pytest.raises(ConfigError, match=r"unknown aggregate 'fixd_mixing'. Did you mean 'fixed_mixing'"):
        from_dict(ModelConfig, {"vocab_size": 3, "max_length": 8, "aggregate": {"kind": "aggregates.fixd_mixing"}})


def test_an_unknown_field_in_code_is_named_with_the_closest_known_one():
    with pytest.raises(ConfigError, match=r"unknown field of ModelConfig 'widht'\. Did you mean 'width'"):
        jw.ModelConfig(vocab_size=3, max_length=4, widht=8)
    with pytest.raises(ConfigError, match=r"unknown field of attention 'head'\. Did you mean 'heads'"):
        jw.aggregates.config_class("attention")(head=2)
    with pytest.raises(ConfigError, match="attention: heads: expected"):
        jw.aggregates.config("attention", heads=0)
