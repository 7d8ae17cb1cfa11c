"""Refuse releases of jax that are known to compute wrong numbers for this library."""

import importlib.metadata

# https://github.com/jax-ml/jax/issues/39103: on CPU a vmapped matrix-vector product followed by a
# reduction is silently wrong. https://github.com/jax-ml/jax/issues/39257: crashes at run time.
FAULTY = {"0.10.2": "computes wrong numbers on CPU (jax issue 39103)", "0.11.0": "crashes (jax issue 39257)"}
REMEDY = "pip install 'jax!=0.10.2,!=0.11.0' 'jaxlib!=0.10.2,!=0.11.0'"


def refuse_faulty_jax() -> None:
    """Raise ImportError, with the remedy, if jax or jaxlib is a release that must not be used.

    Reads the installed packages' metadata, so it costs no import of jax.
    """
    for package in ("jax", "jaxlib"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # importing jax itself will say what is missing
        if version in FAULTY:
            raise ImportError(f"jaxwalk: {package} {version} {FAULTY[version]}. Install another release: {REMEDY}")
