"""Names of the tensors of DeepseekV3ForCausalLM, in memory and on disk.

In memory transformers v5 fuses a layer's experts into `experts.gate_up_proj` [E, 2F, D] and `experts.down_proj`
[E, D, F]; on disk each expert is three matrices. E experts, F expert width, D hidden.

A released folder may hold more than the language model; `used_names` says what of it is read.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from moetrain.errors import CheckpointError

FUSED_KINDS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""The projections in each fused tensor of a layer's experts, in order."""
_FUSED = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
MTP_COPIES: Mapping[str, str] = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
"""Tensors in a released module of multi-token prediction that are copies, and of what."""
_WRAPPED = (("language_model.", ""), ("model.language_model.", "model."))
"""Prefixes of the language model in a model with an image encoder, and what stands there without one."""
_OTHER_PARTS = ("vision_tower", "mm_projector")
_DERIVED = ".rotary_emb.inv_freq"
_SINGLE = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<kind>gate|up|down)_proj\.weight")


@dataclass(frozen=True, kw_only=True)
class ExpertMatrix:
    """One matrix of one expert. prefix: name of the layer's module of experts. kind: gate, up or down."""

    prefix: str
    expert: int
    kind: str

    @property
    def name(self) -> str:
        """Name of the matrix on disk."""
        return f"{self.prefix}.{self.expert}.{self.kind}_proj.weight"


@dataclass(frozen=True, kw_only=True)
class UsedNames:
    """Which tensors on disk are read. names: name without a wrapper's prefix, to the name on disk.

    unused: number of tensors that are not read, by what they are.
    """

    names: Mapping[str, str]
    unused: Mapping[str, int]


def used_names(names: Iterable[str], *, num_layers: int, num_mtp_layers: int = 0) -> UsedNames:
    """Return which tensors of a folder a model of `num_layers` layers uses, and how many others there are of each kind.

    names: as in the files. num_mtp_layers: modules of multi-token prediction, stored as further layers. Not used:
    tensors of an image encoder and its projector, of layers beyond these, the copies of embedding and head in the
    modules of multi-token prediction, and rotary frequencies, which the config determines. Raises CheckpointError if
    two names on disk mean the same tensor.
    """
    used: dict[str, str] = {}
    unused: Counter[str] = Counter()
    for on_disk in names:
        name = _unwrapped(on_disk)
        layer = _LAYER.match(name)
        part = next((part for part in _OTHER_PARTS if f".{name}".startswith((f".{part}.", f".model.{part}."))), None)
        if part is not None:
            unused[part] += 1
        elif layer is not None and int(layer[1]) >= num_layers + num_mtp_layers:
            unused[f"layers beyond {num_layers + num_mtp_layers - 1} (multi-token prediction)"] += 1
        elif layer is not None and int(layer[1]) >= num_layers and copied_name(name) is not None:
            unused["copies of embedding and head"] += 1
        elif name.endswith(_DERIVED):
            unused["rotary frequencies"] += 1
        elif name in used:
            raise CheckpointError(f"{on_disk} and {used[name]} are the same tensor: remove one of them")
        else:
            used[name] = on_disk
    return UsedNames(names=used, unused=unused)


def copied_name(name: str) -> str | None:
    """Return the name of the tensor of which a module of multi-token prediction has the copy `name`, else None."""
    name = _unwrapped(name)
    layer = _LAYER.match(name)
    return MTP_COPIES.get(name.removeprefix(layer[0])) if layer is not None else None


def _unwrapped(name: str) -> str:
    for prefix, instead in _WRAPPED:
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name


def expert_matrix(name: str) -> ExpertMatrix | None:
    """Return the expert's matrix that has this name on disk; None for every other tensor."""
    match = _SINGLE.fullmatch(name)
    if match is None:
        return None
    return ExpertMatrix(prefix=match["prefix"], expert=int(match["expert"]), kind=match["kind"])


def fused_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each fused tensor in memory the names of its matrices on disk, in their order within the tensor.

    Raises CheckpointError when an expert lacks a matrix.
    """
    present = set(names)
    num_experts: dict[str, int] = {}
    for matrix in filter(None, map(expert_matrix, sorted(present))):
        num_experts[matrix.prefix] = max(num_experts.get(matrix.prefix, 0), matrix.expert + 1)
    fused = {
        f"{prefix}.{kind}": [
            ExpertMatrix(prefix=prefix, expert=expert, kind=part).name for expert in range(count) for part in parts
        ]
        for prefix, count in num_experts.items()
        for kind, parts in FUSED_KINDS.items()
    }
    missing = next((name for matrices in fused.values() for name in matrices if name not in present), None)
    if missing is not None:
        raise CheckpointError(f"{missing} is missing")
    return fused


def hf_disk_tensors(
    tensors: Mapping[str, torch.Tensor], *, first_expert: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name on disk, tensor), with fused tensors divided into the matrices of experts. Tensors are views.

    first_expert: number of the first expert in the fused tensors.
    """
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        for expert, weight in enumerate(tensor, start=first_expert):
            prefix = f"{match['prefix']}.{expert}"
            if match["kind"] == "down_proj":
                yield f"{prefix}.down_proj.weight", weight
            else:
                gate, up = weight.chunk(2)
                yield f"{prefix}.gate_proj.weight", gate
                yield f"{prefix}.up_proj.weight", up


def fused_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fuse the expert matrices of tensors named as on disk; return tensors named as in memory.

    The inverse of `hf_disk_tensors`.

    Raises CheckpointError when an expert lacks one of its matrices.
    """
    fused = {name: tensor for name, tensor in tensors.items() if expert_matrix(name) is None}
    for name, matrices in fused_names(tensors).items():
        num_parts = len(FUSED_KINDS[name.rsplit(".", 1)[1]])
        stacked = [tensors[matrix] for matrix in matrices]
        fused[name] = torch.stack(
            [torch.cat(stacked[first : first + num_parts]) for first in range(0, len(stacked), num_parts)]
        )
    return fused
