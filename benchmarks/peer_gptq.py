"""GPTQModel on a Hugging Face folder, for ``bench_quantize.py``. Runs in GPTQModel's virtual environment.

    GPTQMODEL_CPU_WORKERS=2 HF_HUB_OFFLINE=1 .venv-gptqmodel/bin/python benchmarks/peer_gptq.py MODEL TOKENS OUT

TOKENS: a safetensors file with one int64 tensor [N, T]. OUT gets ``dequantized.safetensors``: float32 [O, I] by module
name. The last line of standard output is JSON: seconds of the quantize call, and its peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file
from torch import Tensor


def unpack(words_WM: Tensor, count: int, bits: int) -> Tensor:
    """int32 [W, M] to [count, M]: values of so many bits along dimension 0, also across words."""
    shifts = torch.arange(32, dtype=torch.int32)[None, :, None]
    stream = (words_WM[:, None] >> shifts & 1).reshape(-1, words_WM.shape[1])[: count * bits]
    powers = 2 ** torch.arange(bits, dtype=torch.int32)[None, :, None]
    return (stream.reshape(count, bits, -1) * powers).sum(1, dtype=torch.int32)


def dequantized(folder: Path, bits: int) -> dict[str, Tensor]:
    """The float32 weights of a folder in GPTQ format, version 2, by module name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    weights = {}
    for key, qweight in tensors.items():
        if key.endswith(".qweight"):
            name = key.removesuffix(".qweight")
            scales, group_I = tensors[f"{name}.scales"].float(), tensors[f"{name}.g_idx"].long()
            q_IO = unpack(qweight, len(group_I), bits)
            zeros_GO = unpack(tensors[f"{name}.qzeros"].T, scales.shape[1], bits).T
            weights[name] = ((q_IO - zeros_GO[group_I]) * scales[group_I]).T.contiguous()
    return weights


class PeakMemory:
    """As in ``common.py``, which this environment cannot import."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self.start = self.highest = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.highest = max(self.highest, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (ids,) = load_file(options.tokens).values()
    # Version 2 keeps zero points as they are. Nothing is off-loaded to a disk: the memory is what it needs.
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=options.symmetric,
                            desc_act=options.act_order, format="gptq_v2", device="cpu", offload_to_disk=False)  # fmt: skip
    model = GPTQModel.load(str(options.model), config, dtype=torch.float32)
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids[:, None]]
    start = time.perf_counter()
    with PeakMemory() as peak:
        model.quantize(calibration, batch_size=options.batch_size)
    seconds = time.perf_counter() - start
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.save(str(options.out))
    save_file(dequantized(options.out, options.bits), options.out / "dequantized.safetensors")
    print(json.dumps({
        "seconds": seconds, "peak_mib": (peak.highest - peak.start) / 2**20, "start_mib": peak.start / 2**20,
        "maxrss_mib": highest / 2**20, "version": version("gptqmodel"), "torch": torch.__version__,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
