"""The official layouts of TokenFlow, SEED and LaVIT at their published sizes, and SigLIP's tower under its official names.

tests/data/layouts_semantic.json holds, for each published model, how often each (name, shape) occurs, numbers in names replaced by a star;
it was read off the reference classes, built without weights.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import vistok
from vistok.convert import lavit, seed, tokenflow
from vistok.tokenizers.tokenflow import TokenFlow
from vistok.tokenizers.tokenflow_nets import SemanticEncoderConfig

LAYOUTS = json.loads((Path(__file__).parent / "data" / "layouts_semantic.json").read_text(encoding="utf-8"))
# constant buffers and parts behind what is used; readers leave them aside by these rules
UNUSED = {
    "seed": seed._IGNORED,
    "lavit": re.compile(r"encoder\.(norm|head)\..+"),
    "tokenflow": tokenflow._NEVER_USED,
}


def counted(names):
    """{(name with stars, shape): how often} of {name: shape}."""
    return Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) + " " + "x".join(map(str, shape)) for name, shape in names.items())


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def used(family, variant):
    """The layout without what is never read."""
    rule = UNUSED[family]
    return {key: count for key, count in LAYOUTS[family][variant].items() if not rule.fullmatch(key.split()[0])}


@pytest.mark.parametrize("variant, changes", [("released_mlp", {}), ("reverse_qformer", {"head": "reverse"})])
def test_seed_2_has_the_official_names_and_shapes(variant, changes):
    with torch.device("meta"):
        model = vistok.create("seed-2", **changes)
    assert counted(shapes(seed.official_state(model.settings, model.state_dict()))) == used("seed", variant)


@pytest.mark.parametrize("decoder, sizes", [("tokenizer_decoder", (768,)), ("highres_tokenizer_decoder", (768, 1280))])
def test_lavit_has_the_official_names_and_shapes(decoder, sizes):
    with torch.device("meta"):
        model = vistok.create("lavit-7b-v2", condition_sizes=sizes)
    ours = shapes(lavit.official_state(model.settings, model.state_dict()))
    for prefix, part in (("tokenizer_encoder.", "tokenizer_encoder"), ("tokenizer_decoder.", decoder)):
        assert counted({key.removeprefix(prefix): value for key, value in ours.items() if key.startswith(prefix)}) == used("lavit", part)


@pytest.mark.parametrize(
    "variant, preset, changes",
    [
        ("clipb_224", "tokenflow-b", dict(image_size=(224, 224), scales=tokenflow.SCALES[14], decoder_width=128, decoder_blocks=2)),
        ("clipb_224_enhanced", "tokenflow-b", dict(image_size=(224, 224), scales=tokenflow.SCALES[14])),
        ("vitamin_xlarge_256", "tokenflow-l", {}),
        ("siglip_384", "tokenflow-xl", {}),
    ],
)
def test_tokenflow_has_the_official_names_and_shapes(variant, preset, changes):
    with torch.device("meta"):
        model = vistok.create(preset, **changes)
    layout = used("tokenflow", variant)
    if variant == "siglip_384":  # the tower's last layer comes after the tokens that are used
        layers = ".encoder.layers.*."
        layout = {key: count - 1 if layers in key else count for key, count in layout.items()}
    assert counted(shapes(tokenflow.official_state(model))) == layout


@pytest.fixture(scope="module")
def siglip():
    """A tiny SigLIP tower of transformers and a TokenFlow of its shape; 28 px and patches of 9, so that a column of pixels is left over."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=9)
        tower = SiglipVisionModel(SiglipVisionConfig(**shape)).eval()
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        encoder = SemanticEncoderConfig(kind="siglip", width=24, depth=2, num_heads=3, hidden=40, patch_size=9, table_grid=3)
        config = vistok.create("tokenflow-tiny").settings
        fields = dict(
            image_size=(28, 28), scales=(1, 2, 3), encoder=encoder, semantic_decoder_grid=3, semantic_decoder_heads=2,
            pixel_multipliers=(1, 1, 1, 1, 1), decoder_multipliers=(1, 1, 1, 1, 1), decoded_size=28, codebook_update="gradient",
            kmeans_iterations=0, revive_after=0,
        )  # fmt: skip
        model = TokenFlow(type(config)(**{**vars(config), **fields})).eval()
    return tower, model


def siglip_state(tower, model):
    """An official state dict: ours, with the whole tower of transformers under its names."""
    state = {key: value.clone() for key, value in tokenflow.official_state(model).items() if not key.startswith("encoder_vqkd.")}
    names = tower.state_dict()
    prefix = "" if any(key.startswith("vision_model.") for key in names) else "vision_model."
    return state | {f"encoder_vqkd.{prefix}{key}": value.clone() for key, value in names.items()}


def test_a_siglip_tower_gives_the_hidden_states_before_its_last_layer(siglip, tmp_path):
    tower, model = siglip
    state = siglip_state(tower, model)
    torch.save({"model": state}, tmp_path / "tokenflow.pt")
    options = dict(image_size=(28, 28), scales=(1, 2, 3), encoder_heads=3, semantic_decoder_heads=2, decoded_size=28, norm_groups=8)
    read = tokenflow.from_official(tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3, **options)
    assert read.settings.encoder == model.settings.encoder and read.settings.pixel_size == 48  # 16 pixels a cell of the grid
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = (((images + 1) * 127.5).clamp(0, 255) / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(read.semantic_tokens(images), expected, atol=1e-5, rtol=1e-4)
    decoded = read.decode(read.encode(images))
    assert decoded.shape == images.shape and decoded.isfinite().all()


def test_what_is_behind_the_tokens_is_not_read_and_comes_back_as_zeros(siglip, tmp_path):
    tower, model = siglip
    state = siglip_state(tower, model)
    torch.save({"model": state}, tmp_path / "tokenflow.pt")
    options = dict(image_size=(28, 28), scales=(1, 2, 3), encoder_heads=3, semantic_decoder_heads=2, decoded_size=28, norm_groups=8)
    read = tokenflow.from_official(tmp_path, **options)
    tokenflow.to_official(read, tmp_path / "out")
    written = torch.load(tmp_path / "out" / "tokenflow.pt", weights_only=True)["model"]
    kept = tokenflow.official_state(read)
    assert set(kept) < set(state) <= set(written) and all(torch.equal(written[key], state[key]) for key in kept)
    last = [key for key in state if ".encoder.layers.2." in key]
    assert last and not set(last) & set(kept) and all(written[key].abs().max() == 0 for key in last)
    del state["encoder_vqkd.vision_model.encoder.layers.1.mlp.fc1.bias"]
    torch.save({"model": state}, tmp_path / "tokenflow.pt")
    with pytest.raises(ValueError, match="layers.1.mlp.fc1.bias"):
        tokenflow.from_official(tmp_path, **options)


@pytest.mark.parametrize(
    "changes",
    [{"qkv_bias": False}, {"head": "reverse", "reverse_depth": 3}, {"registers": 5}, {"cross_every": 3, "depth": 4}],
    ids=["no biases in the ViT", "reverse head", "few registers", "rare cross-attention"],
)
def test_seed_of_other_shapes_survives_the_official_format(changes, tmp_path):
    base = vistok.create("seed-tiny").settings
    fields = {name: changes[name] for name in ("head", "reverse_depth") if name in changes}
    if "qkv_bias" in changes:
        fields["vision"] = type(base.vision)(**{**vars(base.vision), "qkv_bias": False})
    if "registers" in changes:
        fields |= {"num_registers": 5, "is_causal": False}
    if "cross_every" in changes:
        fields["qformer"] = type(base.qformer)(**{**vars(base.qformer), "cross_every": 3, "depth": 4})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("seed-tiny", pixels=None, **fields).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    if model.settings.vision.qkv_bias:
        for block in model.vision.blocks:
            block.attention.qkv.bias.data[48:96] = 0  # the format has no bias on the keys
    seed.to_official(model, tmp_path)
    heads = dict(vision_heads=4, qformer_heads=4, block_heads=4, is_causal=model.settings.is_causal)
    again = seed.from_official(tmp_path, **heads)
    assert again.settings.vision == model.settings.vision and again.settings.head == model.settings.head
    assert [layer.cross is None for layer in again.qformer.layers] == [layer.cross is None for layer in model.qformer.layers]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    again_images = again.normalize(images)
    assert torch.equal(model.encode(images).ids, again.encode(images).ids) and again_images.isfinite().all()
