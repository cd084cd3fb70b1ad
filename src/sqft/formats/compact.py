"""Compact folders: a sparse model, float or INT, whose zeros take one bit (``kernels/compact.py``), without loss.

Every sparse weight ``X`` is ``X.compact_mask`` int64 [O, ceil(I / 64)], ``X.compact_values`` and ``X.compact_shape``
(O, I), and of INT weights what ``QuantLinear`` has besides: ``X.scales``, and ``X.qzeros`` and ``X.g_idx`` where they
say anything. Embeddings and head that are integers times a scale of the row (``kernels/rows.py``) are ``X.row_values``
int8 and ``X.row_scales``. All else is as it was. The masks are in there: none lies beside it. ``config.json`` names the
model type "sqft-compact", which other tools refuse, and holds the model's own.

``CompactReader`` gives the tensors of the folder that was packed, bit for bit: whatever reads weights reads both kinds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sqft.errors import SqftError, VerificationError, shown
from sqft.formats.checkpoint import write_quantize_config
from sqft.formats.settings import Format, Settings, check_groups, expect, group_columns, need, take
from sqft.kernels.compact import WIDTH, Compact, pack, packed_mask, starts, unpack
from sqft.kernels.packed import pack_mask, pack_words
from sqft.kernels.rows import Rows, as_rows
from sqft.models.reader import SafetensorsReader, check_equal, same_bits
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter, copy_settings
from sqft.models.weights import Weight, block_index
from sqft.quantization.grid import Grid
from sqft.quantization.linear import QuantLinear
from sqft.registry import FORMATS
from sqft.sparsity.masks import as_bits, as_stored, load_masks, save_masks
from sqft.strict import read_object

TYPE, VERSION = "sqft-compact", 1
MASK, VALUES, SHAPE = "compact_mask", "compact_values", "compact_shape"
ROW_VALUES, ROW_SCALES = "row_values", "row_scales"


def is_compact(folder: str | Path) -> bool:
    try:
        return read_object(Path(folder) / "config.json", data=True).get("model_type") == TYPE
    except (OSError, ValueError):
        return False


def open_weights(folder: str | Path) -> SafetensorsReader:
    """The reader of a model folder, compact or not. Raises SqftError if it cannot be read."""
    return CompactReader(folder) if is_compact(folder) else SafetensorsReader(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``. Raises SqftError."""
    try:
        return read_object(folder / "config.json", data=True)
    except (OSError, ValueError) as error:
        raise SqftError(f"{folder / 'config.json'} cannot be read ({error})") from None


def coder_of(config: Mapping[str, Any]) -> tuple[Format, Settings] | None:
    """How a model's weights are packed, by its ``config.json``; None: they are floats."""
    if not (packed := config.get("quantization_config")):
        return None
    method = need(packed, "quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise SqftError(f"weights that are quantized by '{shown(method)}' are not read: known are {', '.join(FORMATS)}")
    coder: Format = FORMATS[method]
    return coder, coder.read_config(packed)


class CompactReader(SafetensorsReader):
    """A compact folder as the folder that it was made from. ``modules``: the compact ones; ``config``: the model's
    ``config.json``. Raises SqftError for a folder that is not whole or that a later sqft wrote."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        config = read_config(self.folder)
        if config.get("version") != VERSION:
            raise SqftError(f"{folder} has compact weights of version {config.get('version')}, this sqft reads "
                            f"{VERSION}: update sqft")  # fmt: skip
        inner, self._masked = config.get("config"), bool(config.get("masks"))
        if not isinstance(inner, dict):
            raise SqftError(f"{folder} has no configuration of its model: config.json is corrupt")
        self.config: dict[str, Any] = inner
        self._coded = coder_of(self.config)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self._files: Mapping[str, Tensor] = self.layout
        self.modules = {name.removesuffix(f".{MASK}"): None for name in self._files if name.endswith(f".{MASK}")}
        self._rows = {
            name.removesuffix(ROW_SCALES) + "weight" for name in self._files if name.endswith(f".{ROW_SCALES}")
        }
        plain = {name: t for name, t in self._files.items() if not self._is_compact(*name.rpartition("."))}
        plain |= {name: self._row_layout(name) for name in self._rows}
        restored = {f"{module}.{leaf}": tensor.to("meta")
                    for module in self.modules for leaf, tensor in self._encode(module, True).items()}  # fmt: skip
        self.layout: Mapping[str, Tensor] = plain | restored

    def get(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if name in self._rows:
            return self.rows(module).dense()
        if name not in self.layout or not self._stands_for(module, leaf):
            return super().get(name)
        if self._last[0] != module:
            self._last = (module, self._encode(module))
        return self._last[1][leaf]

    def _is_compact(self, module: str, _: str, leaf: str) -> bool:
        """Whether a tensor of the file stands for others."""
        if leaf in (ROW_VALUES, ROW_SCALES):
            return True
        return module in self.modules and (self._coded is not None or leaf in (MASK, VALUES, SHAPE))

    def _stands_for(self, module: str, leaf: str) -> bool:
        """Whether a tensor is one of those that compact ones stand for."""
        return module in self.modules and (self._coded is not None or leaf == "weight")

    def compact(self, module: str) -> Compact:
        """A module's weight as it lies in the file."""
        mask, values = (super(CompactReader, self).get(f"{module}.{leaf}") for leaf in (MASK, VALUES))
        found = Compact(mask, values, self._shape(module)[1], self._coded[1].bits if self._coded else 0)
        if values.ndim != 1 or values.numel() != int(starts(found)[-1]) or _beyond(found):
            raise SqftError(f"{module}.{VALUES} of {self.folder} does not fit its mask: the file is corrupt")
        return found

    def rows(self, module: str) -> Rows:
        """A weight whose rows are integers times a scale, as it lies in the file."""
        return Rows(*(super(CompactReader, self).get(f"{module}.{leaf}") for leaf in (ROW_VALUES, ROW_SCALES)))

    def _row_layout(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        values, scales = self._files.get(f"{module}.{ROW_VALUES}"), self._files[f"{module}.{ROW_SCALES}"]
        if values is None or values.dtype != torch.int8 or values.ndim != 2 or scales.shape != values.shape[:1]:
            raise SqftError(f"{module}.{ROW_SCALES} of {self.folder} does not fit its values: the file is corrupt")
        return torch.empty(values.shape, dtype=scales.dtype, device="meta")

    def _shape(self, module: str) -> tuple[int, int]:
        """(O, I). Raises SqftError if the module's tensors do not fit it."""
        shape = take(self._files, SHAPE, module, 1, f"{module}.{SHAPE}")
        expect(module, SHAPE, shape, (2,), True)
        outputs, inputs = super().get(f"{module}.{SHAPE}").tolist()
        mask, scales = self._files[f"{module}.{MASK}"], self._files.get(f"{module}.scales")
        values = take(self._files, VALUES, module, 1, f"{module}.{VALUES}")
        fits = mask.dtype == torch.int64 and mask.shape == (outputs, -(-inputs // WIDTH)) and inputs > 0
        fits = fits and (values.dtype == torch.uint8 if self._coded is not None else values.dtype.is_floating_point)
        if self._coded is not None:
            columns = group_columns(module, inputs, self._coded[1].group_size)
            fits = fits and scales is not None and scales.shape == (inputs // columns, outputs)
        if not fits:
            raise SqftError(f"{module}.{MASK} of {self.folder} does not fit its shape: the file is corrupt")
        return outputs, inputs

    def masks(self) -> dict[str, Tensor]:
        """uint8 [O, ceil(I / 8)], by module, of the folder that was packed; positions of those that are not compact."""
        compact = {module: packed_mask(self.compact(module)).contiguous() for module in self.modules}
        return load_masks(self.folder) | (compact if self._masked else {})

    def layer(self, module: str, empty: bool = False) -> QuantLinear:
        """A packed module; ``empty``: shapes alone."""
        layer = self.grid_layer(module, empty)
        if not empty:
            layer.qweight = pack_words(self.integers(module, layer.grid()).mT, layer.bits)
        return layer

    def integers(self, module: str, grid: Grid) -> Tensor:
        """uint8 [O, I] of a packed module, of whose grid a pruned weight is the zero point."""
        compact = self.compact(module)
        zero_OI = F.pad(grid.spread(grid.zero_OG, compact.inputs), (0, -compact.inputs % WIDTH))
        return unpack(compact, zero_OI.view(*compact.mask_OB.shape, WIDTH))

    def grid_layer(self, module: str, empty: bool = False) -> QuantLinear:
        """A packed module without its integers: grid and bias."""
        assert self._coded is not None
        settings = self._coded[1]
        outputs, inputs = self._shape(module)
        own = {leaf: self._files.get(f"{module}.{leaf}") for leaf in ("scales", "qzeros", "g_idx", "bias")}
        state = {leaf: t if empty else super(CompactReader, self).get(f"{module}.{leaf}")
                 for leaf, t in own.items() if t is not None}  # fmt: skip
        layer = QuantLinear(inputs, outputs, settings.bits, settings.group_size, "bias" in state,
                            device="meta" if empty else None)  # fmt: skip
        layer.symmetric = settings.symmetric
        groups = layer.scales.shape[0]
        for leaf, tensor in state.items():
            expect(module, leaf, tensor, tuple(getattr(layer, leaf).shape), leaf in ("qzeros", "g_idx"))
        if "g_idx" in state:
            check_groups(module, "g_idx", state["g_idx"], inputs, groups)
        if not empty:
            state.setdefault("qzeros", _middle(layer))
        layer.load_state_dict(state, strict=False, assign=True)
        return layer

    @property
    def bits(self) -> int:
        """Of packed weights; 0: they are floats."""
        return self._coded[1].bits if self._coded is not None else 0

    def _encode(self, module: str, empty: bool = False) -> dict[str, Tensor]:
        if self._coded is not None:
            return self._coded[0].encode(self.layer(module, empty), self._coded[1].version)
        if empty:
            dtype = self._files[f"{module}.{VALUES}"].dtype
            return {"weight": torch.empty(self._shape(module), dtype=dtype, device="meta")}
        return {"weight": unpack(self.compact(module))}


def config_of(reader: SafetensorsReader) -> dict[str, Any]:
    """The model's own ``config.json``. Raises SqftError."""
    return reader.config if isinstance(reader, CompactReader) else read_config(reader.folder)


def masks_of(reader: SafetensorsReader) -> dict[str, Tensor]:
    """The folder's masks, by module, as bits or positions (see ``masks.stored_masks``)."""
    return reader.masks() if isinstance(reader, CompactReader) else load_masks(reader.folder)


class Packer:
    """Reads a folder that is not compact as one that is. Weights stay as they are that are not sparse enough to gain by
    it, or (of other tools) that would not come back bit for bit. ``parts``: a folder for compact modules until all of
    them are known."""

    def __init__(self, source: SafetensorsReader, parts: Path) -> None:
        self.source, self._parts = source, parts
        self.config = read_config(source.folder)
        self._coded = coder_of(self.config)
        self.masks = load_masks(source.folder)
        leaf = self._coded[0].key if self._coded else "weight"
        found = [name.removesuffix(f".{leaf}") for name in source.layout if name.endswith(f".{leaf}")]
        self._candidates = [name for name in found if not self.masks or name in self.masks]
        self.compacted: dict[str, Path] = {}  # where a module's tensors lie

    def layout(self) -> dict[str, Tensor]:
        """Names and shapes of what is to be written."""
        planned = dict(self.source.layout)
        for module in {**dict.fromkeys(self._candidates), **dict.fromkeys(self._tables())}:
            if (tensors := self.tensors(module, self._own(module))) is not None:
                self.compacted[module] = self._parts / f"{len(self.compacted)}.safetensors"
                save_file(tensors, self.compacted[module])
                planned = {name: t for name, t in planned.items() if name.rpartition(".")[0] != module}
                planned |= {f"{module}.{leaf}": t.to("meta") for leaf, t in tensors.items()}
        return planned

    def written(self) -> Iterator[tuple[str, Tensor]]:
        """What is to be written, after ``layout``."""
        for name in self.source.layout:
            if name.rpartition(".")[0] not in self.compacted:
                yield name, self.source.get(name)
        for module, part in self.compacted.items():
            with safe_open(part, "pt") as tensors:
                for leaf in tensors.keys():  # noqa: SIM118 - it is no mapping
                    yield f"{module}.{leaf}", tensors.get_tensor(leaf)
            part.unlink()

    def settings(self) -> dict[str, Any]:
        """``config.json``."""
        return {"model_type": TYPE, "version": VERSION, "masks": bool(self.masks), "config": self.config}

    def _own(self, module: str) -> dict[str, Tensor]:
        names = [name for name in self.source.layout if name.rpartition(".")[0] == module]
        return {name.rpartition(".")[2]: self.source.get(name) for name in names}

    def _tables(self) -> list[str]:
        """Modules outside of blocks that have a weight of two dimensions: embeddings and head."""
        return [name.removesuffix(".weight") for name, tensor in self.source.layout.items()
                if name.endswith(".weight") and tensor.ndim == 2 and block_index(name) is None]  # fmt: skip

    def tensors(self, module: str, own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Of a compact module; None: it stays as it is."""
        if block_index(module) is None and "weight" in own and (rows := as_rows(own["weight"])) is not None:
            beside = {leaf: t for leaf, t in own.items() if leaf != "weight"}
            return {ROW_VALUES: rows.q_VI, ROW_SCALES: rows.scale_V} | beside
        if module not in self._candidates:
            return None
        return self._float(module, own) if self._coded is None else self._integers(module, own, *self._coded)

    def _float(self, module: str, own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        weight = own["weight"]
        if weight.ndim != 2:
            return None
        packed = self.masks.get(module)
        if packed is None:  # -0.0 has a bit
            packed = pack_mask(weight.contiguous().view(torch.uint8).view(*weight.shape, -1).any(-1))
        made = pack(weight, packed)
        if made.values.nbytes + made.mask_OB.nbytes >= weight.nbytes or not same_bits(unpack(made), weight):
            return None
        return _named(made, weight.shape) | {leaf: t for leaf, t in own.items() if leaf != "weight"}

    def _integers(self, module: str, own: Mapping[str, Tensor], coder: Format,
                  settings: Settings) -> dict[str, Tensor] | None:  # fmt: skip
        layer = coder.decode(module, own, settings)
        again = coder.encode(layer, settings.version)
        if again.keys() != own.keys() or not all(same_bits(again[leaf], tensor) for leaf, tensor in own.items()):
            return None
        weight = Weight(module, layer)
        nonzero_OI = weight.nonzero()
        packed = as_bits(weight, self.masks[module]) if module in self.masks else pack_mask(nonzero_OI)
        made = pack(layer.integers(), packed, settings.bits)
        if made.values.nbytes + made.mask_OB.nbytes >= own[coder.key].nbytes:
            return None
        lost = pack_mask(layer.integers() != layer.grid().zero_OG[:, layer.g_idx.long()]) & ~packed
        if bool(lost.any()):  # a pruned weight that is not zero, or an integer that a scale of 0 hides
            return None
        beside = {"scales": layer.scales, "bias": layer.bias,
                  "qzeros": None if torch.equal(layer.qzeros, _middle(layer)) else layer.qzeros,
                  "g_idx": None if layer.groups_are_contiguous else layer.g_idx}  # fmt: skip
        return _named(made, weight.shape) | {leaf: t.detach() for leaf, t in beside.items() if t is not None}


def _beyond(found: Compact) -> bool:
    """Whether a mask has bits beyond the last column."""
    left = -found.inputs % WIDTH
    return bool(left and (found.mask_OB[:, -1] >> (WIDTH - left)).any())


def _middle(layer: QuantLinear) -> Tensor:
    """``qzeros`` of a symmetric grid."""
    zeros_OG = torch.full(layer.scales.shape[::-1], 2 ** (layer.bits - 1))
    return pack_words(zeros_OG, layer.bits).mT.contiguous()


def _named(made: Compact, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {MASK: made.mask_OB, VALUES: made.values, SHAPE: torch.tensor(tuple(shape))}


def pack_folder(source: SafetensorsReader, out: Path) -> int:
    """Writes the compact form of a model folder into the folder ``out``, and compares; returns how many weights are
    compact. Raises SqftError if none would be smaller, VerificationError if a tensor or mask does not come back."""
    parts = out / ".parts"
    parts.mkdir()
    packer = Packer(source, parts)
    writer = ModelWriter(packer.layout(), out, MAX_SHARD_BYTES)
    if not packer.compacted:
        raise SqftError("the model has no weight that is sparse enough to be smaller in compact form: keep it as it is")
    for name, tensor in packer.written():
        writer.add(name, tensor)
    writer.close()
    parts.rmdir()
    _write_settings(packer.settings(), source.folder, out)
    if left := {name: mask for name, mask in packer.masks.items() if name not in packer.compacted}:
        save_masks(left, out)
    written = CompactReader(out)
    check_equal(source, written)
    masks = masks_as_stored(written)
    if masks.keys() != packer.masks.keys() or not all(same_bits(m, masks[n]) for n, m in packer.masks.items()):
        raise VerificationError("the masks were not written bit for bit: nothing was kept; this is a bug in sqft, "
                                "please report it")  # fmt: skip
    return len(packer.compacted)


def compact_in_place(folder: Path) -> int:
    """``pack_folder`` of a folder that is being written."""
    whole = folder / ".whole"
    entries = list(folder.iterdir())
    whole.mkdir()
    for entry in entries:
        entry.rename(whole / entry.name)
    compacted = pack_folder(SafetensorsReader(whole), folder)
    shutil.rmtree(whole)
    return compacted


def unpack_folder(source: CompactReader, out: Path) -> None:
    """Writes the folder that was packed into the folder ``out``."""
    writer = ModelWriter(source.layout, out, MAX_SHARD_BYTES)
    for name in source.layout:
        writer.add(name, source.get(name))
    writer.close()
    _write_settings(source.config, source.folder, out)
    if masks := masks_as_stored(source):
        save_masks(masks, out)
    check_equal(source, SafetensorsReader(out))


def masks_as_stored(source: CompactReader) -> dict[str, Tensor]:
    """What ``masks.safetensors`` of the folder that was packed holds."""
    masks = source.masks()
    if source.config.get("quantization_config"):
        masks |= {name: as_stored(Weight(name, source.layer(name)), masks[name]) for name in source.modules if masks}
    return masks


def _write_settings(config: dict[str, Any], source: Path, out: Path) -> None:
    copy_settings(source, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "quantize_config.json").unlink(missing_ok=True)
    if config.get("quantization_config"):
        write_quantize_config(config["quantization_config"], out)
