"""A checkpoint format: an integer a byte, [O, I], whatever the bits."""

from sqft.formats.settings import Format, Settings
from sqft.quantization.grid import Grid
from sqft.quantization.linear import QuantLinear
from sqft.quantization.method import Quantized


def encode(layer, version):
    grid = layer.grid()
    tensors = {"bytes": layer.integers(), "scale": grid.scale_OG.contiguous(), "zero": grid.zero_OG.contiguous()}
    return tensors | ({} if layer.bias is None else {"bias": layer.bias.detach()})


def decode(module, tensors, settings):
    grid = Grid(settings.bits, tensors["scale"], tensors["zero"])
    quantized = Quantized(tensors["bytes"], grid)
    return QuantLinear.from_quantized(quantized, settings.group_size, settings.symmetric, tensors.get("bias"))


def read_config(config):
    return Settings(config["bits"], config["group_size"], config["symmetric"], "bytes")


def make_config(layers, float_linears, version):
    first = next(iter(layers.values()))
    return {"quant_method": "bytes", "bits": first.bits, "group_size": first.stored_group_size,
            "symmetric": first.symmetric}  # fmt: skip


BYTES = Format("bytes", ("bytes",), encode, decode, read_config, make_config)
