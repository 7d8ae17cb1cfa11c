"""Pretrained families beside transformers: tiny models of each, every bias and norm randomised, saved and loaded."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.pretrained._family import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, T = 61, 32, 19
RECURRENT = {"mamba", "mamba2", "rwkv"}

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
    "llama": (
        "LlamaConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 24,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
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


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A folder, transformers' model in it, and ours."""
    kind, choices = CASES[request.param]
    folder = tmp_path_factory.mktemp("pretrained")
    config = getattr(transformers, kind)(**choices)
    # Gates times gates, layer after layer: with larger parameters float32 would hold Mamba's stream to 3e-4 alone.
    theirs = randomised(config, scale=0.2 if config.model_type in RECURRENT else 0.3)
    theirs.save_pretrained(folder)
    return folder, theirs, jw.load(folder)[0]


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


def compare(theirs, ours, path, atol=1e-4):
    """Log-probabilities and every hidden state; the last of transformers' is after the final norm.

    Before it are the token vectors, which recurrent families leave out, and what comes after each block.
    """
    with torch.no_grad():
        out = theirs(torch.tensor(path)[None], output_hidden_states=True)
    walk = jax.jit(jw.encoding_walk)(ours, path)
    hidden = [h[0].numpy() for h in out.hidden_states]
    blocks, halved = theirs.config.num_hidden_layers, getattr(theirs.config, "rescale_every", 0)
    after_blocks = walk.stations[:: 2 * ours.depth // blocks]
    stations = after_blocks[1:] if theirs.config.model_type in RECURRENT else after_blocks[:-1]
    assert len(hidden) == blocks + 1
    for number, (station, expected) in enumerate(zip(stations, hidden[:-1], strict=True), start=1):
        np.testing.assert_allclose(station, expected * (2 ** (number // halved) if halved else 1), atol=atol)
    np.testing.assert_allclose(walk.context, hidden[-1], atol=atol)
    expected = torch.log_softmax(out.logits[0].double(), -1).numpy()
    np.testing.assert_allclose(jax.jit(jw.next_log_probs)(ours, path), expected, atol=atol)
    return expected


def test_log_probabilities_and_hidden_states(pair):
    _, theirs, ours = pair
    compare(theirs, ours, tokens())


def test_no_number_is_altered(pair):
    folder, _, ours = pair
    theirs = np.concatenate([p.detach().numpy().ravel() for p in not_run(folder).parameters()])
    loaded = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(ours)])
    np.testing.assert_array_equal(np.sort(loaded), np.sort(theirs))


def test_gradients_for_the_token_vectors(pair):
    _, theirs, ours = pair
    path = tokens(1)
    vectors = theirs.get_input_embeddings().weight[torch.tensor(path)].detach().requires_grad_()
    log_probs = torch.log_softmax(theirs(inputs_embeds=vectors[None], use_cache=False).logits[0], -1)
    log_probs[torch.arange(T - 1), torch.tensor(path[1:])].sum().backward()
    expected = vectors.grad.numpy()
    got = jax.jit(jw.path_gradient)(ours, path)
    if ours.embed.norm is not None:  # theirs is for what is normed
        (got,) = jax.vjp(jax.vmap(ours.embed.norm), ours.embed.table[path])[1](got)
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


def test_old_forms_of_the_config(pair, tmp_path):
    """As versions of transformers before 5 wrote it: no rope_parameters, torch_dtype, keys of generation, nulls."""
    folder, theirs, _ = pair
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters", {}).get("rope_theta")
    config |= {"torch_dtype": "float32", "use_cache": True, "pruned_heads": {}, "top_k": 50}
    config.pop("dtype", None)
    if theta is not None:
        config |= {"rope_theta": theta, "rope_scaling": None, "pretraining_tp": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    compare(theirs, jw.load(tmp_path)[0], tokens(4))


def test_saved_without_its_head(pair, tmp_path):
    """A tied model that was saved as a bare one: its tensors lack the prefix."""
    folder, theirs, ours = pair
    not_run(folder).base_model.save_pretrained(tmp_path)
    if ours.unembed.weight is None:
        compare(theirs, jw.load(tmp_path)[0], tokens(5))
    else:
        with pytest.raises(jw.checkpoint.CheckpointError, match=r"missing: (lm_)?head\.weight\."):
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
