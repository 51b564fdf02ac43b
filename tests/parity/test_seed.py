"""SEED against tensors of the reference implementation, read through the official checkpoint format.

Every tensor of every case is checked; sizes, depths, heads and the kind of decode head come from its case.json.
"""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from vistok.convert.seed import from_official, official_state, to_official
from vistok.tokenizers.seed import SEEDLossWeights
from vistok.training.tasks.contrast import contrastive_loss

FAMILY = "seed"
INPUTS = {"image", "random_indices", "clip_target", "text_ids", "text_mask"}
STAGE_ONE = "stage1."
CONSTANT = re.compile(r"(stage1\.)?(Reverse_)?Qformer\.(bert\.embeddings\.position_ids|cls\..+)")


@pytest.fixture(scope="module")
def options(golden):
    config = golden.spec["config"]
    return dict(
        vision_heads=config["vit"]["num_heads"],
        vision_eps=config["vit"]["layernorm_eps"],
        qformer_heads=config["bert"]["num_attention_heads"],
        qformer_eps=config["bert"]["layer_norm_eps"],
        block_heads=config["blocks_num_heads"],
    )


@pytest.fixture(scope="module")
def state(golden):
    return load_file(golden.folder / "state.safetensors")


@pytest.fixture(scope="module")
def model(golden, options, state, tmp_path_factory):
    """The released tokenizer together with what stage I adds."""
    file = tmp_path_factory.mktemp("seed") / "stage_one.safetensors"
    save_file({key.removeprefix(STAGE_ONE): value for key, value in state.items()}, file)
    return from_official(file, **options)


def released(state):
    return {key: value for key, value in state.items() if not key.startswith(STAGE_ONE)}


def assert_same_weights(written, original):
    """Bit-equal but for counters and unused heads, which a file may or may not carry."""
    named = [{key for key in state if not CONSTANT.fullmatch(key)} for state in (written, original)]
    assert named[0] == named[1]
    assert all(torch.equal(written[key], original[key]) for key in original if key in written)


def test_the_converted_config_says_what_the_case_says(model, golden):
    settings, config = model.settings, golden.spec["config"]
    bert, vit = config["bert"], config["vit"]
    assert (settings.qformer.width, settings.qformer.depth) == (bert["hidden_size"], bert["num_hidden_layers"])
    assert settings.qformer.hidden == bert["intermediate_size"]
    crossed = [i for i in range(bert["num_hidden_layers"]) if i % config["cross_attention_freq"] == 0]
    assert [i for i in range(settings.qformer.depth) if i % settings.qformer.cross_every == 0] == crossed
    assert (settings.vision.width, settings.vision.depth, settings.vision.patch_size) == (vit["embed_dim"], vit["depth"], vit["patch_size"])
    assert settings.vision.qkv_bias == vit.get("qkv_bias", True)
    assert settings.image_size == (vit["img_size"],) * 2 and settings.vision.hidden == int(vit["embed_dim"] * vit["mlp_ratio"])
    assert (settings.quantizer.codebook_size, settings.quantizer.code_dim) == (config["n_embed"], config["codebook_embed_dim"])
    assert settings.quantizer.codebook_weight == config["legacy_beta"] and settings.quantizer.commitment_weight == 1.0
    assert (settings.num_registers, settings.block_depth) == (config["num_query_token"], config["decode_depth"])
    assert settings.embedding_dim == config["image_features_dim"]
    if settings.text is not None:
        assert settings.text.embedding_dim == config["itc_embed_dim"] and settings.text.vocab_size == bert["vocab_size"]
        assert settings.text.max_words == bert["max_position_embeddings"]
    assert bert.get("hidden_act", "gelu") == "gelu", "SEED's Q-Former knows the exact GELU only"
    if config["use_qformer_image"]:
        assert (settings.head, settings.reverse_depth) == ("reverse", config["reverse_layers"])
    else:
        assert (settings.head, list(settings.head_widths)) == ("mlp", config["image_down"])


def test_the_official_checkpoint_is_written_back_bit_equal(golden, options, state, tmp_path):
    original = released(state)
    save_file(original, tmp_path / "model.safetensors")
    model = from_official(tmp_path / "model.safetensors", **options)
    assert model.text is None
    to_official(model, tmp_path / "out", num_positions=golden.spec["config"]["bert"]["max_position_embeddings"])
    written = torch.load(tmp_path / "out" / "seed_quantizer.pt", weights_only=True)
    assert_same_weights(written, original)
    again = from_official(tmp_path / "out", **options)
    assert again.settings == model.settings
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_stage_one_is_written_back_bit_equal(model, golden, state, tmp_path):
    to_official(model, tmp_path, num_positions=golden.spec["config"]["bert"]["max_position_embeddings"])
    written = torch.load(tmp_path / "seed_quantizer.pt", weights_only=True)
    original = {key.removeprefix(STAGE_ONE): value for key, value in state.items()}
    assert_same_weights(written, original)


@torch.no_grad()
def images_to_tokens(model, golden):
    features = model.features(golden.io["image"])
    embeddings = model.qformer(features)
    outputs = {}
    hook = model.qformer.layers[0].register_forward_hook(lambda module, inputs, output: outputs.update(first=output))
    model.qformer(features)
    hook.remove()
    z = model.to_code(embeddings)
    quantized = model.quantizer(z)
    results = {
        "image_embeds": features,
        "causal_embeddings": embeddings,
        "causal_layer0": outputs["first"],
        "z": z,
        "quantised": model.embed(quantized.ids),
        "indices": quantized.ids,
        "vq_loss_legacy": quantized.loss,
    }
    for name in golden.io:
        perturbed = re.fullmatch(r"causal_embeddings_perturb(\d+)", name)
        if perturbed:
            registers = model.qformer.registers.data
            kept = registers.clone()
            registers[int(perturbed[1])].neg_()
            results[name] = model.qformer(features)
            registers.copy_(kept)
    return results


@torch.no_grad()
def tokens_to_embeddings(model, golden):
    codes = model.embed(golden.io["indices"])
    return {
        "query_output_up": model.decoded_registers(codes),
        "generation_embedding": model.generation_embedding(codes),
        "recon_s": model.semantic_reconstruction(codes),
        "random_generation_embedding": model.generation_embedding(model.embed(golden.io["random_indices"])),
    }


def stage_two(model, golden):
    """The losses, and the gradients named after official keys."""
    io = golden.io
    model.zero_grad()
    output = model.reconstruct(io["causal_embeddings"], target=io["clip_target"])
    total = sum(output.losses.values())
    total.backward()
    weights = SEEDLossWeights()
    gradients = official_state(model.settings, {key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return {
        "loss_embed": output.losses["vq"] / weights.vq,
        "loss_recon_s": output.losses["semantic"] / weights.semantic,
        "loss_distil_image": output.losses["generation"] / weights.generation,
        "loss_total": total,
        "grad_codebook": gradients["quantize.embedding.weight"],
        "grad_encode_task_0": gradients["encode_task_layer.0.weight"],
    }


@torch.no_grad()
def distance_to_kink(model, golden):
    """The smallest input of a ReLU of the decode head; infinite where there is none."""
    if model.settings.head != "mlp":
        return float("inf")
    inputs = []
    hooks = [layer.register_forward_hook(lambda module, x, out: inputs.append(out)) for layer in model.head.layers[:-1]]
    model.generation_embedding(model.embed(golden.io["indices"]))
    for hook in hooks:
        hook.remove()
    return min((float(x.abs().min()) for x in inputs), default=float("inf"))


@torch.no_grad()
def stage_one(model, golden):
    io = golden.io
    if model.text is None:
        return {}
    states = model.text_states(model.text.embed(io["text_ids"]), io["text_mask"].bool())
    images, texts = model.image_direction(io["causal_embeddings"]), model.text_direction(states)
    return {
        "text_hidden": states,
        "itc_image_feat": images,
        "itc_text_feat": texts,
        "itc_sim_i2t": images @ texts.t() / model.text.temperature,
        "loss_itc": contrastive_loss(images, texts, model.text.temperature),
    }


def test_every_tensor_of_the_case(model, golden):
    results = images_to_tokens(model, golden) | tokens_to_embeddings(model, golden) | stage_two(model, golden) | stage_one(model, golden)
    assert set(golden.spec["tensors"]) == set(golden.io)
    at_kink = distance_to_kink(model, golden) < 1e-5
    for name in golden.io:
        if name in INPUTS:
            continue
        assert name in results, f"{golden.folder}: {name} is not understood by this test"
        if name.startswith("grad_") and at_kink:
            # rounding decides which side of a ReLU's kink a unit is on, and the gradient jumps there
            error = (results[name] - golden.io[name]).norm() / golden.io[name].norm()
            assert error < 1e-3, f"{name}: off by {error:.3g} of its size"
        else:
            golden.compare(name, results[name])


def test_later_registers_do_not_change_earlier_ones(model, golden):
    if not model.settings.is_causal:
        return
    results = images_to_tokens(model, golden)
    for name in results:
        perturbed = re.fullmatch(r"causal_embeddings_perturb(\d+)", name)
        if perturbed:
            n = int(perturbed[1])
            torch.testing.assert_close(results[name][:, :n], results["causal_embeddings"][:, :n], rtol=0, atol=1e-6)
