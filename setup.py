"""Packaging of puredif_jax; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
(VERSION,) = re.findall(
    r'__version__ = "(.+)"', (HERE / "puredif_jax" / "__init__.py").read_text()
)
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.8",
    "pytest-timeout>=2.3",
    "scikit-learn>=1.6",
]

setup(
    name="puredif_jax",
    version=VERSION,
    description="Find, judge, repair and measure backdoors in diffusion models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    keywords=["backdoor", "diffusion models", "trigger inversion", "security", "jax"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["puredif_jax*"]), "puredif_jax.configs"],
    package_dir={"puredif_jax.configs": "configs"},
    package_data={
        "puredif_jax": ["py.typed", "assets/*", "assets/zoo/*/*", "assets/zoo/*/*/*"]
    },
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "numpy>=2.0",
        "chex>=0.1.92",
        "absl-py>=2.1",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "pillow>=10",
        "PyYAML>=6",
    ],
    entry_points={"console_scripts": ["puredif = puredif_jax.command:run"]},
    extras_require={
        "hub": ["huggingface_hub>=0.30"],
        "test": TEST,
        "torch": ["torch==2.13.0", "diffusers>=0.36"],
        "lpips": [
            "lpips>=0.1.4",
            "torch==2.13.0",
            "torchvision==0.28.0",
            "scikit-learn>=1.6",
        ],
        "docs": [
            "latex2mathml>=3.78",
            "mkdocs-jupyter>=0.25",
            "mkdocs-material>=9.6,<10",
            "mkdocstrings[python]>=1",
        ],
        "dev": [*TEST, "pre-commit>=4", "ruff>=0.9", "mypy>=1.15", "types-PyYAML>=6"],
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
    },
)
