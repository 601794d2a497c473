"""OpenCLIP's vision tower under transformers' names, so that one tower has one hash whichever program wrote it.

    mlfoundations/open_clip    src/open_clip/transformer.py, VisionTransformer: queries, keys and values in one matrix
    huggingface/transformers   src/transformers/models/clip/modeling_clip.py, CLIPVisionModel: in three
"""

from collections.abc import Mapping

from torch import Tensor

AROUND = {"class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
          "positional_embedding": "embeddings.position_embedding.weight"}
AROUND |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")
           for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"))}  # spelt so by both
LAYER = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
         "mlp.c_proj": "mlp.fc2"}


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a CLIPVisionModel from that of an OpenCLIP `visual` without `proj`, on the same memory.

    Raises ValueError where it is not all of one.
    """
    count = sum(name.endswith("attn.in_proj_weight") for name in state)
    names, packed = dict(AROUND), {}
    for k in range(count):
        for kind in ("weight", "bias"):
            theirs, ours = f"transformer.resblocks.{k}", f"encoder.layers.{k}"
            names |= {f"{theirs}.{a}.{kind}": f"{ours}.{b}.{kind}" for a, b in LAYER.items()}
            packed[f"{theirs}.attn.in_proj_{kind}"] = [f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv"]
    wanted = names.keys() | packed.keys()
    if state.keys() != wanted:
        raise ValueError(
            f"The vision tower should be OpenCLIP's, of {count} layers and {len(wanted)} tensors. It lacks "
            f"{sorted(wanted - state.keys())[:3] or 'nothing'} and holds unknown "
            f"{sorted(state.keys() - wanted)[:3] or 'nothing'}. Fetch encoder.pt again, complete."
        )
    found = {ours: state[theirs] for theirs, ours in names.items()}
    for theirs, three in packed.items():
        found |= zip(three, state[theirs].chunk(3), strict=True)
    return found
