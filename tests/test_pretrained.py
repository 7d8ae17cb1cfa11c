"""Pretrained models: formats, tokenizers, refusals and export, without other libraries' models."""

import itertools
import json
import math
import random
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.aggregates import attention
from jaxwalk.checkpoint import CheckpointError
from jaxwalk.config import ConfigError, LongRopeScaling, MLPConfig
from jaxwalk.pretrained import _hub, _safetensors, _tokenizer
from jaxwalk.pretrained._family import Keys, family_of, read_config
from jaxwalk.pretrained._rope import Rope, rope
from jaxwalk.text import BPEVocabulary, ByteVocabulary, TokenizerVocabulary, vocabulary_from_dict
from tests.conftest import model_of

phrases = ("the path of a token", "it's 12 tokens, in 2024!", "naïve  walks\n\tend")

SHAPES = {
    "llama": {
        "aggregate": attention.Config(
            heads=4, kv_heads=2, head_width=6, positions="rope", rope_theta=500.0, bias=False
        ),
        "filter": MLPConfig(24, "silu", gated=True, bias=False),
        "norm": "rms_norm",
        "norm_eps": 1e-3,
        "positions": "none",
    },
    "gpt2": {"filter": MLPConfig(24, "gelu_tanh"), "tied": True},
}


def exportable(shape, **choices):
    return model_of(**{"max_length": 32, **SHAPES[shape], **choices})


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture(params=SHAPES)
def exported(request, tmp_path):
    """A model and the folder that it was written to."""
    model = exportable(request.param)
    jw.export(model, tmp_path / "model")
    return model, tmp_path / "model"


def edit(folder, **changes):
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None or k not in changes}
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(folder):
    store = _safetensors.Safetensors([folder / "model.safetensors"])
    return {name: np.array(store.read(name)) for name in store.shapes}


# Export and load.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_is_exact(shape, dtype, tied, tmp_path):
    model = jw.astype(exportable(shape, tied=tied), dtype)
    jw.export(model, tmp_path / "model")
    again, vocabulary = jw.load(tmp_path / "model", dtype)
    equal(model, again)
    assert vocabulary is None
    file, _ = jw.load(tmp_path / "model" / "model.safetensors", dtype)
    equal(model, file)


def test_biases_of_llama_make_the_round_trip(tmp_path):
    biased = attention.Config(heads=2, positions="rope")
    model = exportable("llama", aggregate=biased, filter=MLPConfig(24, "silu", gated=True), depth=13)
    assert len(model.layers.blocks) == 1
    jw.export(model, tmp_path / "model")
    equal(model, jw.load(tmp_path / "model")[0])


def test_casting_on_load(exported):
    model, folder = exported
    equal(jw.astype(model, jnp.bfloat16), jw.load(folder, jnp.bfloat16)[0])
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        equal(jw.astype(model, jnp.float64), jw.load(folder, jnp.float64)[0])


def test_parameters_do_not_change_with_the_file(exported):
    model, folder = exported
    loaded, _ = jw.load(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\1" * 64)
    equal(model, loaded)


def test_placed_on_a_mesh(exported):
    model, folder = exported
    mesh = jw.training.make_mesh(jw.config.MeshConfig(data=4, model=2))
    loaded, _ = jw.load(folder, mesh=mesh)
    equal(model, loaded)
    expected = jax.tree.leaves(jw.sharding.shardings(model, mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(loaded)] == expected
    assert (
        loaded.layers[0].aggregate.qkv.weight.addressable_shards[0].data.shape[1] * 2
        == (model.layers[0].aggregate.qkv.weight.shape[1])
    )


def test_sharded_files(exported):
    model, folder = exported
    tensors = tensors_of(folder)
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        _safetensors.write(folder / f"model-{i}.safetensors", {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    equal(model, jw.load(folder)[0])
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing: model-1\.safetensors"):
        jw.load(folder)


def test_files_are_as_the_safetensors_package_has_them(exported, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    _, folder = exported
    tensors = tensors_of(folder)
    for name, array in numpy.load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(array, tensors[name])
    numpy.save_file(tensors, tmp_path / "again.safetensors")
    store = _safetensors.Safetensors([tmp_path / "again.safetensors"])
    for name, array in tensors.items():
        np.testing.assert_array_equal(store.read(name), array)


def test_what_has_no_such_shape_is_refused_with_every_reason(tmp_path):
    with pytest.raises(ConfigError) as error:
        jw.export(model_of(norm="rms_norm", positions="sinusoidal", placement="parallel"), tmp_path / "model")
    for part in ("as gpt2:", "as llama:", "placement would be 'pre'", "norm would be 'layer_norm'", "'sinusoidal'"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=r"layer 0: its aggregate is CausalMean, not attention; layer 1"):
        jw.export(model_of(aggregate="causal_mean"), tmp_path / "model")
    model = exportable("gpt2")
    with pytest.raises(ConfigError, match="layers that differ"):
        jw.export(model.with_layer(0, placement="post"), tmp_path / "model")
    mixed = exportable("llama", filter=(MLPConfig(24, "silu", gated=True, bias=False), MLPConfig(24)))
    with pytest.raises(ConfigError, match=r"filter\[1\]\.gated"):
        jw.export(mixed, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    jw.export(model, tmp_path / "model")
    with pytest.raises(ConfigError, match="new folder or an empty one"):
        jw.export(model, tmp_path / "model")
    with pytest.raises(ConfigError, match="no tokenizer"):
        jw.export(model, tmp_path / "other", jw.text.SymbolVocabulary(tuple("abcde")))


# Configs and tensors that would be another model.


def test_unknown_keys_are_named_all_at_once(exported):
    model, folder = exported
    edit(
        folder,
        hyper_connections=4,
        sparse_attention={"stride": 3},
        bos_token_id=2,
        auto_map={"AutoModel": "x.Y"},
        z=None,
    )
    with pytest.raises(CheckpointError, match=r"hyper_connections = 4, sparse_attention = \{'stride': 3\}"):
        jw.load(folder)
    edit(folder, hyper_connections=None, sparse_attention=None)
    equal(model, jw.load(folder)[0])


@pytest.mark.parametrize(
    ("shape", "changes", "expected"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3': low_freq_factor: expected a"),
        ("llama", {"rope_parameters": {"rope_type": "strange"}}, "unknown rope_type 'strange'"),
        ("llama", {"rope_parameters": {"rope_theta": 9.0}}, "rope_theta: expected one value"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type: expected one value, got 'linear' and",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor: expected at least 1"),
        ("llama", {"rope_parameters": {"rope_type": "default", "alpha": 2.0}}, "not known: alpha = 2.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        (
            "llama",
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2},
            "sliding_window: expected a value",
        ),
        ("llama", {"model_type": "qwen2", "layer_types": ["chunked_attention"]}, "layer_types: expected 'sliding_att"),
        ("llama", {"rope_scaling": "yarn"}, "dictionary"),
        ("llama", {"model_type": "gemma3", "rope_parameters": {"rope_theta": 1.0}}, "expected full_attention and slid"),
        ("llama", {"model_type": "gemma3", "text_config": {"hidden_size": 3}}, "hidden_size: expected one value"),
        ("llama", {"hidden_act": "gelu", "add_cross_attention": True}, "add_cross_attention: .*hidden_act: "),
        ("llama", {"hidden_size": None, "vocab_size": None}, "vocab_size: expected a value.*hidden_size: expected a"),
        ("llama", {"num_key_value_heads": 3}, "kv_heads: expected a divisor"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = "),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected False"),
        ("gpt2", {"activation_function": "mish"}, "activation_function: expected one of gelu, "),
        ("gpt2", {"n_inner": "two"}, "hidden: expected int"),
    ],
)
def test_configs_that_are_refused(shape, changes, expected, tmp_path):
    jw.export(exportable(shape), tmp_path / "model")
    edit(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=expected):
        jw.load(tmp_path / "model")


def test_rotary_positions_in_every_form():
    sets = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    original = {"original_max_position_embeddings": 16}
    new = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 5.0, **sets, **original}}
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "su", **sets}, **original}
    # The short factors, and so no longer paths than they are for; the gain is that of the whole length.
    expected = Rope(5.0, LongRopeScaling((1.0, 2.0), math.sqrt(1.5)), 1.0, 16)
    for given in (new, old):
        keys = Keys(given)
        assert rope(keys, 64) == expected
        assert keys.finish((), None) == []
    given = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "partial_rotary_factor": 0.5}
    assert rope(Keys(given), 64, 7.0, share=1.0) == Rope(7.0, None, 0.5, 64)


def test_tensors_by_two_names_are_refused(tmp_path):
    jw.export(exportable("llama"), tmp_path)
    edit(tmp_path, model_type="gemma3_text", rope_parameters=None, mlp_bias=None)
    tensors = tensors_of(tmp_path)
    tensors["language_model.model.norm.weight"] = tensors["model.norm.weight"]
    _safetensors.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"by another name too: (language_model\.)?model\.norm\.weight"):
        jw.load(tmp_path)


SMALL = {
    "opt": {
        "vocab_size": 5,
        "hidden_size": 8,
        "ffn_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    },
    "gpt_neo": {
        "vocab_size": 5,
        "hidden_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 8,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox": {
        "vocab_size": 5,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "rotary_pct": 0.5,
    },
}


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("opt", {"word_embed_proj_dim": 4}, "word_embed_proj_dim: expected 8, got 4, which is not supported"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm: expected False, got True"),
        ("opt", {"scale_embeddings": True, "learned_embeddings": False}, "learned_emb.*: expected True.*scale_emb"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "'local' for each of 2 layers, got .'global', 'global', "),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 1]]}, r"attention_types: .*got \['global', 'sparse'"),
        ("gpt_neo", {"attention_layers": ["global", "global"]}, "attention_layers: expected .'global', 'local'."),
        (
            "gpt_neox",
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            r"partial_rotary_factor: .*0\.5 and 0\.25",
        ),
        ("gpt_neox", {"rotary_emb_base": 9.0, "rope_parameters": {"rope_theta": 8.0}}, "rope_theta: expected one"),
        ("gpt_neox", {"rope_scaling": {"type": "strange", "factor": 2.0}}, "'strange'"),
        ("gpt_neox", {"rotary_pct": 0.1}, "rope_width: expected an even number"),
        ("gpt_neox", {"rotary_emb": 9.0}, "not known: rotary_emb = 9"),
    ],
)
def test_configs_of_other_families_that_are_refused(family, changes, expected):
    read_config(family_of(family), SMALL[family])
    with pytest.raises(CheckpointError, match=expected):
        read_config(family_of(family), {**SMALL[family], **changes})


def test_a_family_that_is_not_here(exported):
    _, folder = exported
    edit(folder, model_type="bert")
    with pytest.raises(CheckpointError, match=r"unknown model_type 'bert'.*Choices: .*gpt2.*llama"):
        jw.load(folder)
    assert {"gpt2", "llama"} <= set(jw.pretrained.names())


# As the repositories have them whose models these are: conversions have kept keys of the original format.
PUBLISHED = {
    "mamba": {
        "d_inner": 64,
        "d_model": 32,
        "fused_add_norm": True,
        "intermediate_size": 64,
        "n_layer": 2,
        "pad_vocab_size_multiple": 8,
        "rms_norm": True,
        "ssm_cfg": {},
        "state_size": 16,
        "time_step_init_scheme": "random",
        "time_step_rank": 48,
        "use_cache": True,
    },
    "mamba2": {
        "chunk_size": 256,
        "head_dim": 16,
        "intermediate_size": 64,
        "n_groups": 2,
        "norm_before_gate": True,
        "num_heads": 4,
        "rms_norm": True,
        "time_step_limit": [0.0, float("inf")],
        "time_step_rank": 256,
        "time_step_scale": 1.0,
    },
    "rwkv": {
        "attention_hidden_size": 32,
        "context_length": 64,
        "intermediate_size": 128,
        "layer_norm_epsilon": 1e-05,
        "rescale_every": 6,
        "tie_word_embeddings": False,
    },
}
MAMBA = {"expand": 2, "residual_in_fp32": True}
SHARED = {"mamba": MAMBA, "mamba2": MAMBA, "rwkv": {}}


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("mamba", {}, None),
        ("mamba", {"time_step_rank": "auto"}, None),
        ("mamba", {"ssm_cfg": {"d_state": 8}, "n_layer": 3}, "n_layer: expected 2, got 3.*ssm_cfg: expected {}, got"),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act: expected one of silu, swish, got 'gelu'"),
        ("mamba", {"attn_layer_idx": [1]}, r"not known: attn_layer_idx = \[1\]"),
        ("mamba2", {}, None),
        ("mamba2", {"time_step_limit": [0.0, {"__float__": "Infinity"}]}, None),
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit: expected \[0.0, inf\], got \[0.0, 0.1\]"),
        ("mamba2", {"head_dim": 8}, "head_dim: expected 16, got 8"),
        ("rwkv", {}, None),
        ("rwkv", {"attention_hidden_size": 48}, "attention_hidden_size: expected 32, got 48"),
        ("rwkv", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon: expected 1e-05, got 0.001"),
        ("mamba2", {"rms_norm": False, "intermediate_size": 96}, "intermediate_size: .*rms_norm: expected True"),
    ],
)
def test_configs_of_published_recurrent_models(kind, changes, expected):
    given = {"model_type": kind, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 7}
    given |= {**SHARED[kind], **PUBLISHED[kind], **changes}
    if expected is None:
        config = read_config(family_of(kind), given)
        assert (config.width, config.depth, config.filter) == (32, 4 if kind == "rwkv" else 2, None)
        return
    with pytest.raises(CheckpointError, match=expected):
        read_config(family_of(kind), given)


def test_a_config_of_another_format(exported):
    """As state-spaces/mamba-130m has it."""
    _, folder = exported
    (folder / "config.json").write_text(json.dumps({"d_model": 768, "n_layer": 24, "ssm_cfg": {}, "rms_norm": True}))
    with pytest.raises(CheckpointError, match=r"no model_type: expected one of .*mamba.*ends in '-hf': give that"):
        jw.load(folder)


def test_tensors_are_named_all_at_once(exported):
    _, folder = exported
    tensors = tensors_of(folder)
    names = sorted(tensors)
    gone, bent, narrow = names[0], names[1], names[2]
    del tensors[gone]
    tensors[bent] = np.zeros((3, 7), np.float32)
    tensors["adapter.weight"] = np.zeros(3, np.float32)
    _safetensors.write(folder / "model.safetensors", tensors)
    relabel(folder / "model.safetensors", narrow, "I32")
    with pytest.raises(CheckpointError) as error:
        jw.load(folder)
    for part in (f"missing: {gone};", "not known: adapter.weight;", f"{bent}: expected shape [", f"{narrow} (I32)"):
        assert part in str(error.value)


def relabel(file, name, dtype):
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_a_tied_head_may_be_there_twice_if_it_is_equal(tmp_path):
    model = exportable("gpt2")
    jw.export(model, tmp_path)
    tensors = tensors_of(tmp_path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
    _safetensors.write(tmp_path / "model.safetensors", tensors)
    equal(model, jw.load(tmp_path)[0])
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    _safetensors.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"not known: lm_head\.weight"):
        jw.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files_are_named(exported, share):
    _, folder = exported
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        jw.load(folder)


@pytest.mark.parametrize("position", [0, 7, 8, 30])
def test_corrupted_headers_are_named(exported, position):
    _, folder = exported
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[position] = 0xFF
    file.write_bytes(raw)
    with pytest.raises(CheckpointError):
        jw.load(folder)


def test_pickles_are_refused_with_the_way_out(exported, tmp_path):
    _, folder = exported
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        with pytest.raises(CheckpointError, match=r"expected safetensors or GGUF.*save_pretrained"):
            jw.load(tmp_path / name)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected safetensors.*save_pretrained"):
        jw.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors, .*got neither"):
        jw.load(folder)


def test_what_is_not_there(tmp_path):
    for name in ("model.gguf", "model.safetensors", "nowhere"):
        with pytest.raises(CheckpointError, match="expected a run's folder"):
            jw.load(tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"expected config\.json beside it"):
        jw.load(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors or \.gguf file"):
        jw.load(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        jw.load(tmp_path)


def test_choices_that_a_source_does_not_have(exported):
    _, folder = exported
    for choices, expected in (
        ({"revision": "main"}, "revision: expected a repository"),
        ({"step": 3}, "step: expected a run's folder"),
        ({"dtype": jnp.int8}, "dtype: expected a floating-point one"),
    ):
        with pytest.raises(ConfigError, match=expected):
            jw.load(folder, **choices)


def test_a_prompt_longer_than_the_context(exported):
    with pytest.raises(ValueError, match="expected at most 32 tokens"):
        jw.next_log_probs(jw.load(exported[1])[0], np.zeros(33, int))


# The hub.


def test_the_hub_without_a_network():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(
        CheckpointError, match=r"'jaxwalk/nothing'.*cannot be reached\. Give a folder with config\.json"
    ):
        jw.load("jaxwalk/nothing")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GatedRepoError", "gated.*HF_TOKEN"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "at revision 'step7'.*no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("EntryNotFoundError", r"no config\.json"),
        (None, r"cannot be reached \(OSError: no route\)"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, kind, expected):
    hub = pytest.importorskip("huggingface_hub")

    def answer(*_, **__):
        if kind is None:
            raise OSError("no route")
        cls = getattr(hub.errors, kind)
        raise cls.__new__(cls)

    monkeypatch.setattr(hub, "hf_hub_download", answer)
    with pytest.raises(CheckpointError, match=expected):
        jw.load("someone/something", revision="step7")


def test_a_repository_is_loaded_as_its_folder_is(monkeypatch, exported):
    hub = pytest.importorskip("huggingface_hub")
    model, folder = exported
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name, revision: str(folder / name))
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or str(folder))
    equal(model, jw.load("someone/something", revision="step7")[0])
    ((repo, options),) = asked
    assert (repo, options["revision"]) == ("someone/something", "step7")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in options["allow_patterns"])
    edit(folder, model_type="bert")
    with pytest.raises(CheckpointError, match="unknown model_type"):
        jw.load("someone/something")
    assert len(asked) == 1


def test_what_may_be_a_repository():
    assert all(map(_hub.is_repository, ("gpt2", "HuggingFaceTB/SmolLM2-135M")))
    assert not any(map(_hub.is_repository, ("/tmp/x", "./x", "a/b/c", "../a", "", "a b")))


# Tokenizers.


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_vocabularies_make_the_round_trip(kind, tmp_path):
    vocabulary = ByteVocabulary() if kind == "bytes" else BPEVocabulary.train(phrases * 2, 270)
    model = exportable("gpt2", vocab_size=vocabulary.size)
    jw.export(model, tmp_path / "model", vocabulary)
    _, again = jw.load(tmp_path / "model")
    assert isinstance(again, TokenizerVocabulary)
    assert (again.size, again.begin) == (vocabulary.size, vocabulary.begin)
    np.testing.assert_array_equal(again.lengths, vocabulary.lengths)
    for text in phrases:
        np.testing.assert_array_equal(again.encode(text), vocabulary.encode(text))
        assert again.decode([again.begin, *again.encode(text)]) == text
        assert [again.symbol(t) for t in again.encode(text).tolist()] == [
            vocabulary.symbol(t) for t in vocabulary.encode(text).tolist()
        ]
    assert again.symbol(again.begin) == "<|begin|>"
    assert vocabulary_from_dict(json.loads(json.dumps(again.to_dict()))) == again
    jw.export(model, tmp_path / "again", again)
    assert jw.load(tmp_path / "again")[1] == again


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, 256),  # the tokenizer puts it before every text
        ({"bos_token": "A"}, 256),
        ({"add_bos_token": False, "bos_token": "<|begin|>"}, None),
        ({"add_bos_token": True}, 256),
    ],
)
def test_the_begin_of_path_token_is_what_is_put_before_a_text(said, expected, tmp_path):
    jw.export(exportable("gpt2", vocab_size=257), tmp_path / "model", ByteVocabulary())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(said))
    edit(tmp_path / "model", bos_token_id=3)
    assert jw.load(tmp_path / "model")[1].begin == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"bos_token": "A"}, None),  # a token of which nothing says that it is put before
        ({"add_bos_token": True}, 3),
        ({"add_bos_token": True, "bos_token": None}, None),
        ({"add_bos_token": True, "bos_token": "<|begin|>"}, 256),
        ({"add_bos_token": True, "bos_token": {"content": "<|begin|>", "lstrip": False}}, 256),
        ({"add_bos_token": True, "bos_token": "A"}, 65),
    ],
)
def test_a_tokenizer_without_a_template(said, expected, tmp_path):
    jw.export(exportable("gpt2", vocab_size=257), tmp_path / "model", ByteVocabulary())
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(said))
    edit(tmp_path / "model", bos_token_id=3)
    assert jw.load(tmp_path / "model")[1].begin == expected


def test_tokenizers_that_cannot_be(tmp_path):
    jw.export(exportable("gpt2", vocab_size=257), tmp_path / "model", ByteVocabulary())
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = file.read_text()
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read.*token ids still work"):
        jw.load(tmp_path / "model")
    with pytest.raises(ValueError, match=r"expected ids from 0 to 255, .*got 256"):
        TokenizerVocabulary(tokenizer, None, 256)
    with pytest.raises(ValueError, match="got 300"):
        TokenizerVocabulary(tokenizer, 300, 257)
    file.unlink()
    assert jw.load(tmp_path / "model")[1] is None


def word_level(**more):
    return json.dumps(
        {
            "version": "1.0",
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "the": 1, "path": 2}, "unk_token": "<unk>"},
            **more,
        }
    )


def test_text_that_a_tokenizer_cannot_represent():
    vocabulary = TokenizerVocabulary(word_level(), None, 5)
    assert vocabulary.encode("the path").tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"cannot represent 'walk' at character 4"):
        vocabulary.encode("the walk")
    with pytest.raises(ValueError, match="lone surrogate"):
        vocabulary.encode("\ud800")
    assert vocabulary.symbol(4) == "<4>"
    with pytest.raises(ValueError, match="ids from 0 to 4"):
        vocabulary.decode([5])


def test_a_file_that_asks_for_truncation_is_not_obeyed():
    cut = {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}}
    assert len(TokenizerVocabulary(word_level(**cut), None, 3).encode("the path the path")) == 4


# GGUF.

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
GGUF_SHAPE = {
    "llama": {
        "aggregate": attention.Config(heads=4, kv_heads=2, head_width=64, positions="rope", rope_theta=500.0),
        "filter": MLPConfig(256, "silu", gated=True),
        "norm": "rms_norm",
        "norm_eps": 1e-3,
        "positions": "none",
    },
    "gpt2": {"filter": MLPConfig(256, "gelu_tanh"), "tied": True},
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "transformer.h": "blk",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
METADATA = {
    "llama": {
        "context_length": 32,
        "embedding_length": 256,
        "block_count": 1,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 64,
        "rope.freq_base": 500.0,
        "attention.layer_norm_rms_epsilon": 1e-3,
    },
    "gpt2": {
        "context_length": 32,
        "embedding_length": 256,
        "block_count": 1,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
    },
}
WORDS = ("Ġ", "t", "h", "e", "1", "2", "th", "the", "Ġthe", "12", "Ġ1", "<|im_start|>", "<x>")
MERGES = ("t h", "th e", "Ġ the", "Ġ 1", "1 2")
BLOCKS = {"Q4_K": 144, "Q6_K": 210}


def quantised(gguf, array, kind, rng):
    """An array of a type and the float32 numbers that it stands for, of the format's own definition where simple."""
    kind = gguf.GGMLQuantizationType[kind]
    if kind.name in BLOCKS:  # which the package reads but does not write
        raw = rng.integers(0, 256, (array.shape[0], array.shape[1] // 256, BLOCKS[kind.name]), dtype=np.uint8)
        scale = np.array(rng.uniform(1e-4, 2e-4, raw.shape[:2]), "<f2").view(np.uint8).reshape(*raw.shape[:2], 2)
        if kind.name == "Q4_K":
            raw[..., 0:2], raw[..., 2:4] = scale, scale
        else:
            raw[..., 208:210] = scale
        raw = raw.reshape(array.shape[0], -1)
    else:
        raw = gguf.quants.quantize(array, kind)
    return raw, kind, gguf.quants.dequantize(raw, kind)


def gguf_file(path, shape, kind="F32", *, tokenizer=True, pre="smollm", extra=(), metadata=(), dropped=()):
    """A file as llama.cpp's conversion writes it, and the model that is in it."""
    gguf = pytest.importorskip("gguf")
    model = exportable(shape, **GGUF_SHAPE[shape], width=256, depth=1, vocab_size=len(WORDS), scale=0.05)
    jw.export(model, path.parent / "source")
    tensors = tensors_of(path.parent / "source")
    writer, rng = gguf.GGUFWriter(path, shape), np.random.default_rng(0)
    for key, value in {**METADATA[shape], **dict(metadata)}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{shape}.{key}", value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(list(WORDS))
        writer.add_token_types([3 if w.startswith("<|") else 4 if w == "<x>" else 1 for w in WORDS])
        writer.add_token_merges(list(MERGES))
        writer.add_bos_token_id(11)
        writer.add_add_bos_token(True)
    for name, array in tensors.items():
        theirs = name
        for ours, other in NAMES.items():
            theirs = theirs.replace(ours, other)
        if theirs in dropped:
            continue
        turned = name.endswith(".weight") and any(part in name for part in (".c_attn", ".c_proj", ".c_fc"))
        array = np.ascontiguousarray(array.T) if turned else array
        if array.ndim == 2 and kind != "F32" and name != "transformer.wpe.weight":
            raw, raw_kind, array = quantised(gguf, array, kind, rng)
        else:
            raw, raw_kind = array, None
        # llama.cpp's permutation of q and k, on what is already quantised: rows are quantised one by one.
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            raw = raw.reshape(heads, 2, raw.shape[0] // heads // 2, *raw.shape[1:]).swapaxes(1, 2).reshape(raw.shape)
        tensors[name] = array.T if turned else array
        writer.add_tensor(theirs, np.ascontiguousarray(raw), raw_dtype=raw_kind)
    for name in extra:
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _safetensors.write(path.parent / "source" / "model.safetensors", tensors)
    return jw.load(path.parent / "source")[0]


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gguf(shape, kind, tmp_path):
    model = gguf_file(tmp_path / "model.gguf", shape, kind)
    again, vocabulary = jw.load(tmp_path / "model.gguf")
    assert vocabulary.begin == 11
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.std(one) > 0.001
    path = np.arange(12)
    np.testing.assert_allclose(jw.next_log_probs(again, path), jw.next_log_probs(model, path), atol=1e-5)


def test_gguf_in_a_folder_and_narrow(tmp_path):
    model = gguf_file(tmp_path / "model.gguf", "llama", "Q8_0")
    (tmp_path / "alone").mkdir()
    (tmp_path / "model.gguf").rename(tmp_path / "alone" / "model.gguf")
    equal(
        jax.tree.leaves(jw.astype(model, jnp.bfloat16)), jax.tree.leaves(jw.load(tmp_path / "alone", jnp.bfloat16)[0])
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metadata": {"expert_count": 8}}, "expert_count: expected 0, got 8"),
        ({"metadata": {"rope.dimension_count": 32}}, "rope.dimension_count: expected 64, got 32"),
        ({"metadata": {"rope.scaling.type": "odd", "odd": 1}}, "rope.scaling.type: .*not known: odd = 1"),
        ({"extra": ["rope_freqs.weight"]}, "factors: expected positive numbers"),
        ({"extra": ["rope_factors_long.weight"]}, r"not known: rope_factors_long\.weight"),
        ({"dropped": ["blk.0.attn_q.weight"]}, r"missing: model\.layers\.0\.self_attn\.q_proj\.weight"),
    ],
)
def test_gguf_that_would_be_another_model(options, expected, tmp_path):
    gguf_file(tmp_path / "model.gguf", "llama", **options)
    with pytest.raises(CheckpointError, match=expected):
        jw.load(tmp_path / "model.gguf")


def test_gguf_of_an_architecture_that_is_not_here(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"unknown architecture of a GGUF file 'bert'.*gpt2, llama"):
        jw.load(tmp_path / "model.gguf")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_truncated_gguf_is_named(share, tmp_path):
    gguf_file(tmp_path / "model.gguf", "llama")
    raw = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(CheckpointError, match=r"model\.gguf: cannot be read as GGUF"):
        jw.load(tmp_path / "model.gguf")


def test_the_tokenizer_of_a_gguf(tmp_path):
    """The kind of its pre-tokenizer matters: digits of smollm are words of their own, and take no space with them."""
    gguf_file(tmp_path / "model.gguf", "gpt2")
    vocabulary = jw.load(tmp_path / "model.gguf")[1]
    named = lambda v, text: [WORDS[t] for t in v.encode(text)]
    assert named(vocabulary, "the the12 12") == ["the", "Ġthe", "1", "2", "Ġ", "1", "2"]
    assert named(vocabulary, "<|im_start|>the<x>") == ["<|im_start|>", "the", "<x>"]
    assert vocabulary.decode([11, *vocabulary.encode("the 12")]) == "the 12"
    (tmp_path / "other").mkdir()
    gguf_file(tmp_path / "other" / "model.gguf", "gpt2", pre="gpt-2")
    other = jw.load(tmp_path / "other" / "model.gguf")[1]
    assert named(other, "the the12 12") == ["the", "Ġthe", "12", "Ġ1", "2"]


@pytest.mark.parametrize("kind", sorted(_tokenizer._PRETOKENIZERS))
def test_every_pretokenizer_is_lossless(kind):
    letters = jw.text.byte_letters()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": list(letters),
        "tokenizer.ggml.merges": [],
    }
    vocabulary = _tokenizer.of_gguf(metadata, 256)
    for text in (*phrases, "I'LL 1234567\r\n\r\n  x", "日本語 ½ ٣"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert len(vocabulary.encode(text)) == len(text.encode())


def sentencepiece(text, tokens, scores):
    """SentencePiece's own algorithm: of all neighbours that make a token, join those with the best score, leftmost."""
    pieces = list(text)
    score = dict(zip(tokens, scores, strict=True))
    while True:
        joined = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in score]
        if not joined:
            return pieces
        _, i = min(joined)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_sentencepiece_in_a_gguf():
    """Its pairs have scores in place of an order of merges; characters without a token are bytes."""
    chance = random.Random(0)
    words = [w.replace(" ", "\u2581") for w in ("ab", "abc", "bc", "bcd", " a", " ab", "cd", "  ", "    ", " d", "da")]
    normal = [*"abcd\u2581", *words]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<x>", *normal]
    types = [2, 3, 3, *[6] * 256, 4, *[1] * len(normal)]
    scores = [0.0] * 260 + [-float(i) for i in chance.sample(range(len(normal)), len(normal))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    vocabulary = _tokenizer.of_gguf(metadata, len(tokens))
    named = lambda v, text: [tokens[t] for t in v.encode(text)]
    assert vocabulary.begin == 1
    for _ in range(200):
        text = "".join(chance.choice("abcd ") for _ in range(chance.randrange(1, 24)))
        expected = sentencepiece("\u2581" + text.replace(" ", "\u2581"), normal, scores[260:])
        assert named(vocabulary, text) == expected
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert named(vocabulary, "é")[1:] == ["<0xC3>", "<0xA9>"]
    assert vocabulary.decode(vocabulary.encode("aé日 🦜b")) == "aé日 🦜b"
    assert "<x>" in named(vocabulary, "ab<x>ab")
    assert vocabulary.symbol(tokens.index("<0x0A>")) != ""
    gemma = _tokenizer.of_gguf(metadata | {"tokenizer.ggml.add_space_prefix": False}, len(tokens))
    assert named(gemma, "ab ab") == sentencepiece("ab\u2581ab", normal, scores[260:])
    assert gemma.decode(gemma.encode(" ab")) == " ab"
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.scores: expected one for each of"):
        _tokenizer.of_gguf(metadata | {"tokenizer.ggml.scores": None}, len(tokens))


def test_a_tokenizer_of_a_kind_that_is_not_known_is_none(tmp_path):
    gguf_file(tmp_path / "model.gguf", "llama", pre="strange")
    with pytest.warns(UserWarning, match="pre-tokenizer 'strange'.*token ids still work"):
        model, vocabulary = jw.load(tmp_path / "model.gguf")
    assert vocabulary is None
    assert jnp.isfinite(jw.path_log_prob(model, np.arange(5)))
    (tmp_path / "none").mkdir()
    gguf_file(tmp_path / "none" / "model.gguf", "llama", tokenizer=False)
    assert jw.load(tmp_path / "none" / "model.gguf")[1] is None
