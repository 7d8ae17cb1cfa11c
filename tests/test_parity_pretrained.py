"""Pretrained families beside transformers: tiny models of each, every bias and norm randomised, saved and loaded."""

import copy
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.pretrained import _safetensors
from jaxwalk.pretrained._family import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, T = 61, 32, 19
RECURRENT = {"mamba", "mamba2", "rwkv"}

LLAMA = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-3,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.2,
}
GEMMA3 = {
    **LLAMA,
    "head_dim": 12,
    "attention_bias": True,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# Name of the case: (transformers' config class, its choices). Every choice that can be other than the default is.
CASES = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": V, "n_embd": D, "n_layer": 3, "n_head": 4, "n_positions": 24, "layer_norm_epsilon": 1e-3},
    ),
    "gpt2, untied, narrow, exact gelu": (
        "GPT2Config",
        {
            "vocab_size": V,
            "n_embd": D,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 24,
            "n_inner": 40,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": 40,
            "num_layers": 3,
            "num_heads": 4,
            "max_position_embeddings": 24,
            "attention_types": [[["local", "global"], 1], [["local"], 1]],
            "window_size": 5,
            "activation_function": "gelu",
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "layer_norm_eps": 1e-3,
            "rotary_pct": 0.5,
            "rotary_emb_base": 500.0,
        },
    ),
    "gpt_neox, one after the other, no biases, tanh": (
        "GPTNeoXConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 24,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "tie_word_embeddings": True,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 24,
        },
    ),
    "opt, post-norm, no biases, gelu, norms without parameters": (
        "OPTConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "do_layer_norm_before": False,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "llama": (
        "LlamaConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama, tied, biases, wide heads": (
        "LlamaConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "max_position_embeddings": 24,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    # Built like Llama.
    "mistral": (
        "MistralConfig",
        {
            **LLAMA,
            "sliding_window": 5,
            "head_dim": 6,
            "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 3.0},
        },
    ),
    "qwen2": (
        "Qwen2Config",
        {
            **LLAMA,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "qwen3": (
        "Qwen3Config",
        {
            **LLAMA,
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5},
        },
    ),
    "olmo2": (
        "Olmo2Config",
        {**LLAMA, "attention_bias": True, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
    ),
    "phi3": (
        "Phi3Config",
        {
            **LLAMA,
            "pad_token_id": None,
            "sliding_window": 5,
            "max_position_embeddings": 96,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                **ROPE,
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.2, 1.7],
                "long_factor": [1.1, 2.0, 4.0],
            },
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            **LLAMA,
            "head_dim": 12,
            "attention_bias": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": ROPE,
        },
    ),
    "gemma3_text": ("Gemma3TextConfig", GEMMA3),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {**GEMMA3, "tie_word_embeddings": True, "final_logit_softcapping": None},
            "vision_config": VISION,
        },
    ),
    "mamba": (
        "MambaConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "num_hidden_layers": 3,
            "state_size": 5,
            "time_step_rank": 3,
            "conv_kernel": 3,
            "use_bias": True,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": V,
            "hidden_size": D,
            "num_hidden_layers": 3,
            "expand": 1,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 5,
            "chunk_size": 7,
            "use_bias": True,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "rwkv": (
        "RwkvConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "context_length": 24,
            "rescale_every": 0,
        },
    ),
}


def test_every_family_has_a_case():
    covered = {getattr(transformers, kind).model_type for kind, _ in CASES.values()}
    for name, family in families().items():
        assert covered >= set(family.model_types), name


def test_the_published_table_has_every_case():
    table = (Path(__file__).parent.parent / "benchmarks" / "parity.md").read_text("utf-8")
    assert re.findall(r"^\| ([^|`]+) \| `", table, re.MULTILINE) == list(CASES), "run python benchmarks/parity.py"


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A folder, transformers' model in it, and ours."""
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, *made(request.param, folder)


def made(name, folder):
    """Transformers' model of a case, saved in a folder, and ours, loaded from there."""
    kind, choices = CASES[name]
    config = getattr(transformers, kind)(**choices)
    # Gates times gates, layer after layer: with larger parameters float32 would hold Mamba's stream to 3e-4 alone.
    theirs = randomised(config, scale=0.2 if config.model_type in RECURRENT else 0.3)
    theirs.save_pretrained(folder)
    return theirs, jw.load(folder)[0]


def randomised(config, scale=0.3, seed=0):
    """A model of `config`, each of whose parameters is random: norms around 1, all else around 0."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(float(norm) + scale * torch.randn_like(parameter))
    return model


def not_run(folder):
    """The model in a folder, to be saved again: one of RWKV that has run holds halved matrices."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(seed=0, length=T):
    return np.random.default_rng(seed).integers(0, V, length)


def log_probs_and_states(theirs, ours, path):
    """Pairs, ours and theirs: log-probabilities, and every hidden state, of which the last is after the final norm.

    Before it are the token vectors, which recurrent families leave out, and what comes after each block.
    """
    with torch.no_grad():
        out = theirs(torch.tensor(path)[None], output_hidden_states=True)
    walk = jax.jit(jw.encoding_walk)(ours, path)
    hidden = [h[0].numpy() for h in out.hidden_states]
    config = theirs.config.get_text_config()
    blocks, halved = config.num_hidden_layers, getattr(config, "rescale_every", 0)
    after_blocks = walk.stations[:: 2 * ours.depth // blocks]
    stations = after_blocks[1:] if config.model_type in RECURRENT else after_blocks[:-1]
    if halved:
        hidden[:-1] = [h * 2 ** (number // halved) for number, h in enumerate(hidden[:-1], start=1)]
    states = zip([*stations, walk.context], hidden, strict=True)
    expected = torch.log_softmax(out.logits[0].double(), -1).numpy()
    return (jax.jit(jw.next_log_probs)(ours, path), expected), list(states)


def gradients(theirs, ours, path):
    """A pair, ours and theirs: the gradient of the log-probability of a path for its token vectors."""
    vectors = theirs.get_input_embeddings()(torch.tensor(path)).detach().requires_grad_()
    log_probs = torch.log_softmax(theirs(inputs_embeds=vectors[None], use_cache=False).logits[0], -1)
    log_probs[torch.arange(T - 1), torch.tensor(path[1:])].sum().backward()
    got = jax.jit(jw.path_gradient)(ours, path)
    if ours.embed.norm is not None:  # theirs is for what is normed
        (got,) = jax.vjp(jax.vmap(ours.embed.norm), ours.embed.table[path])[1](got)
    return got, vectors.grad.numpy()


def compare(theirs, ours, path, atol=1e-4):
    """Log-probabilities and every hidden state, within `atol`."""
    log_probs, states = log_probs_and_states(theirs, ours, path)
    for got, expected in (log_probs, *states):
        np.testing.assert_allclose(got, expected, atol=atol)


def test_log_probabilities_and_hidden_states(pair):
    _, theirs, ours = pair
    compare(theirs, ours, tokens())


def test_no_number_is_altered(pair):
    folder, _, ours = pair
    named = not_run(folder).named_parameters()
    read = [p for name, p in named if not re.search(r"vision_tower|multi_modal_projector", name)]
    theirs = np.concatenate([p.detach().numpy().ravel() for p in read])
    loaded = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(ours)])
    np.testing.assert_array_equal(np.sort(loaded), np.sort(theirs))


def test_gradients_for_the_token_vectors(pair):
    _, theirs, ours = pair
    got, expected = gradients(theirs, ours, tokens(1))
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


def test_batches_padding_and_decoding(pair):
    _, theirs, ours = pair
    paths = np.stack([tokens(2), tokens(3)])
    padding = np.ones_like(paths)
    padding[1, 12:] = 0
    with torch.no_grad():
        out = theirs(torch.tensor(paths), attention_mask=torch.tensor(padding))
    expected = torch.log_softmax(out.logits.double(), -1).numpy()
    got = jax.jit(jax.vmap(lambda path, segments: jw.next_log_probs(ours, path, segments=segments)))(paths, padding)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(got[1, :12], expected[1, :12], atol=1e-4)

    state, logits = jw.prefill(ours, paths[0, :5], T)
    step = jax.jit(jw.step)
    for i in range(5, T):
        np.testing.assert_allclose(jax.nn.log_softmax(logits), expected[0, i - 1], atol=1e-4)
        state, logits = step(ours, state, paths[0, i])


NAMES = ("rope_theta", "partial_rotary_factor")


@torch.no_grad()
def test_old_forms_of_the_config(pair, tmp_path):
    """As versions of transformers before 5 wrote it: no rope_parameters, torch_dtype, keys of generation, nulls."""
    folder, theirs, _ = pair
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": "float32", "use_cache": True, "pruned_heads": {}, "top_k": 50}
    config.pop("dtype", None)
    old = ("rotary_emb_base", "rotary_pct") if config["model_type"] == "gpt_neox" else NAMES
    for part in (config, config.get("text_config", {})):
        part.pop("layer_types", None)
        if rope := part.pop("rope_parameters", {}):
            near = rope.get("sliding_attention", {})
            rope = rope.get("full_attention", rope)
            part |= {name: rope.pop(new) for name, new in zip(old, NAMES, strict=True) if new in rope}
            part |= {"rope_local_base_freq": near["rope_theta"], "sliding_window_pattern": 2} if near else {}
            part |= {"rope_scaling": {**rope, "type": rope["rope_type"]} if rope["rope_type"] != "default" else None}
            part |= {"pretraining_tp": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    path = tokens(4)
    np.testing.assert_array_equal(again(torch.tensor(path)[None]).logits, theirs(torch.tensor(path)[None]).logits)
    compare(theirs, jw.load(tmp_path)[0], path)


def test_saved_without_its_head(pair, tmp_path):
    """A tied model that was saved as a bare one: its tensors lack the prefix."""
    folder, theirs, ours = pair
    not_run(folder).base_model.save_pretrained(tmp_path)
    if ours.unembed.weight is None:
        compare(theirs, jw.load(tmp_path)[0], tokens(5))
    else:
        with pytest.raises(jw.checkpoint.CheckpointError, match=r"missing: ((lm_)?head|embed_out)\.weight\."):
            jw.load(tmp_path)


def test_halving_the_stream_changes_an_epsilon_and_nothing_else(tmp_path):
    kind, choices = CASES["rwkv"]
    theirs = randomised(getattr(transformers, kind)(**{**choices, "rescale_every": 2}), scale=0.2)
    theirs.save_pretrained(tmp_path)
    for number, block in enumerate(theirs.rwkv.blocks):
        block.ln1.eps = block.ln2.eps = 1e-5 / 4 ** (number // 2)
    theirs.rwkv.ln_out.eps = 1e-5 / 4
    compare(theirs, jw.load(tmp_path)[0], tokens(7), atol=1e-5)


def test_sharded_and_narrow(pair, tmp_path):
    source, _, ours = pair
    theirs = not_run(source)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    again = jw.load(tmp_path / "sharded")[0]
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        copy.deepcopy(theirs).to(dtype).save_pretrained(folder)
        wide = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        compare(wide, jw.load(folder)[0], tokens(6))


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_models_that_read_images_in_every_layout(layout, tmp_path):
    kind, choices = CASES["gemma3"]
    randomised(getattr(transformers, kind)(**choices)).save_pretrained(tmp_path)
    ours = jw.load(tmp_path)[0]
    file = tmp_path / "model.safetensors"
    store = _safetensors.Safetensors([file])
    tensors = {name: np.array(store.read(name)) for name in store.shapes}
    assert any(name.startswith("vision_tower.") for name in tensors)
    moved = {re.sub(r"^(language_model\.model|model\.language_model)\.", layout, n): a for n, a in tensors.items()}
    _safetensors.write(file, moved)
    for a, b in zip(jax.tree.leaves(jw.load(tmp_path)[0]), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)


# GGUF, as llama.cpp's convert_hf_to_gguf.py writes it: what it can say about each family.
PLAIN = {"attention_bias": False, "rope_parameters": ROPE}
GEMMA_GGUF = {"attention_bias": False, "query_pre_attn_scalar": 12, "tie_word_embeddings": True}
GGUF_CASES = {
    "llama": ("llama", {}),
    "mistral": ("llama", {"sliding_window": None, "rope_parameters": ROPE}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"use_sliding_window": False, **PLAIN}),
    "olmo2": ("olmo2", {"attention_bias": False}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", GEMMA_GGUF),
    "gemma3_text": ("gemma3", {**GEMMA_GGUF, "num_hidden_layers": 6, "sliding_window_pattern": 6}),
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf(name, tmp_path):
    (kind, choices), (architecture, changes) = CASES[name], GGUF_CASES[name]
    theirs = randomised(getattr(transformers, kind)(**{**choices, **changes, "rms_norm_eps": 1e-3}))
    as_llama_cpp_writes(theirs, architecture, tmp_path / "model.gguf")
    compare(theirs, jw.load(tmp_path / "model.gguf")[0], tokens(7))


def as_llama_cpp_writes(theirs, architecture, path):
    gguf = pytest.importorskip("gguf")
    config = theirs.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(0)
    if hasattr(config, "head_dim"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if rope["rope_type"] == "llama3":
        factors = (
            1 / theirs.model.rotary_emb.inv_freq / rope["rope_theta"] ** (torch.arange(0, head_width, 2) / head_width)
        )
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / rope["original_max_position_embeddings"]
        writer.add_rope_scaling_attn_factors(
            (1 + math.log(scale) / math.log(config.original_max_position_embeddings)) ** 0.5
        )
        for which in ("long", "short"):
            writer.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], np.float32))
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_width)
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_dimension_count(int(head_width * rope["partial_rotary_factor"]))
    if architecture in ("phi3", "gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if architecture == "gemma3":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if architecture in ("gemma2", "gemma3"):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, parameter in theirs.named_parameters():
        array = parameter.detach().numpy()
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_transformers_loads_what_is_exported(shape, tmp_path):
    from tests.test_pretrained import exportable, phrases

    vocabulary = jw.text.BPEVocabulary.train(phrases * 2, 270)
    model = exportable(shape, vocab_size=vocabulary.size)
    jw.export(model, tmp_path / "out", vocabulary)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    path = vocabulary.encode(phrases[0])
    compare(theirs, model, path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(phrases[0], add_special_tokens=False).input_ids == path.tolist()
    assert tokenizer.bos_token_id == vocabulary.begin
    theirs.save_pretrained(tmp_path / "again")
    again = jw.load(tmp_path / "again")[0]
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jnp.isfinite(jw.path_log_prob(again, path))
