from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist runs a process a core
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU then


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real data), which is not in the repository")
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama folder."""
    from pico import pico_folder

    return pico_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def sparse(dense: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama, pruned to 50 % by Wanda."""
    import sqft

    out = tmp_path_factory.mktemp("sparse") / "model"
    sqft.sparsify(dense, sqft.SparsifyConfig(), tokens, out=out)
    return out


@pytest.fixture(scope="session")
def examples() -> list:
    import sqft

    return [sqft.Example(f"Q: {i} plus {i}?\nA:", f" {2 * i}", str(2 * i)) for i in range(40)]


@pytest.fixture(scope="session")
def trained(sparse: Path, examples: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked adapter on the sparse pico Llama, trained hard enough to matter."""
    import sqft

    out = tmp_path_factory.mktemp("trained") / "adapter"
    sqft.train(
        sparse, sqft.TrainConfig(max_steps=6, batch_size=4, r=4, lora_alpha=8, learning_rate=0.02), examples, out=out
    )
    return out


@pytest.fixture(scope="session")
def trained_lora(sparse: Path, examples: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA on the sparse pico Llama."""
    import sqft

    out = tmp_path_factory.mktemp("lora") / "adapter"
    config = sqft.TrainConfig(adapter="lora", max_steps=6, batch_size=4, r=4, lora_alpha=8, learning_rate=0.02)
    sqft.train(sparse, config, examples, out=out)
    return out
