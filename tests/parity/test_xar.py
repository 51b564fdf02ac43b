"""xAR against tensors of the reference implementation, read through the official checkpoint format.

Every tensor of every case is checked: a training pass with its gradients, cached velocities, and complete runs of both samplers.
"""

import pytest
import torch
from safetensors.torch import load_file

from vistok.convert.xar import from_official, official_state, to_official
from vistok.generators.xar_sampling import FlowSampling, time_index

FAMILY = "xar"
GROUPS = {"train", "velocity", "sample", "sample_sde", "sample_ode"}


@pytest.fixture(scope="module")
def model(golden):
    return from_official(golden.folder / "state.safetensors")


def _labels(model, labels):
    return torch.where(labels == model.settings.num_classes, -1, labels)


def _condition(model, labels):
    return model.make_condition(len(labels), labels=_labels(model, labels))


def _raster(latents):
    return latents.flatten(2).transpose(1, 2)


def test_every_tensor_of_the_case_belongs_to_a_group_that_is_checked(golden):
    assert {name.split(".")[0] for name in golden.io} <= GROUPS
    assert set(golden.spec["tensors"]) == set(golden.io)


def test_the_converted_config_says_what_the_case_says(model, golden):
    config, ours = dict(golden.spec["config"]), model.settings
    for name in ("label_drop_prob", "batch", "sde_steps", "ode_steps", "cfg_scale", "model_calls_sde", "model_calls_ode"):
        config.pop(name)
    side = config.pop("img_size") // config.pop("vae_stride")
    assert (side, side) == ours.order.layout_shape
    assert int(ours.width * config.pop("mlp_ratio") * 2 / 3) == ours.hidden
    assert config == {
        "embed_dim": ours.width, "encoder_depth": ours.encoder_depth, "decoder_depth": ours.decoder_depth, "num_heads": ours.num_heads,
        "patch_size": 1, "latent_channels": ours.code_dim, "clusters": model.order.num_entities, "cell": ours.order.size,
        "num_classes": ours.num_classes,
    }  # fmt: skip


def test_the_official_checkpoint_is_written_back_bit_equal(model, golden, tmp_path):
    original, ours = load_file(golden.folder / "state.safetensors"), official_state(model)
    assert ours.keys() == original.keys()
    for name, value in original.items():
        if ".rope." in name:
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)
        else:
            assert torch.equal(ours[name], value), name
    to_official(model, tmp_path)
    again = from_official(tmp_path)
    assert again.settings == model.settings
    theirs = again.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())


def test_training_pass(model, golden):
    io, E = golden.io, model.order.num_entities
    is_dropped = io["train.label_drop_u"] < golden.spec["config"]["label_drop_prob"]
    condition = model.make_condition(len(is_dropped), labels=io["train.labels"]).drop(is_dropped, is_dropped)
    clean = model.order.pack(_raster(io["train.latents"]))
    times = io["train.t_normal"].sigmoid().float().view(E, -1).T  # entity-major draws
    noise = io["train.noise"].flatten(1, 2)
    seen = {}
    hook = model.encoder_norm.register_forward_hook(lambda module, args, out: seen.update(encoder=out))
    velocity = model(model.add_noise(clean, noise, times), condition, times=times)
    hook.remove()
    loss = model.denoising_loss(clean, condition, noise=noise, times=times).mean()
    last = model.blocks[-1].modulation.weight
    grads = torch.autograd.grad(loss, [model.classes.table.weight, model.encoder_blocks[0].attention.qkv.weight, last])
    null = model.settings.num_classes
    results = {
        "train.labels_used": torch.where(condition.labels < 0, null, condition.labels),
        "train.t_index": time_index(times).T.flatten(),
        "train.clean_entities": clean.unflatten(1, (E, -1)),
        "train.x_t": model.add_noise(clean, noise, times),
        "train.time_emb": model.time_embedding(time_index(times)).transpose(0, 1).flatten(0, 1),
        "train.encoder_out": seen["encoder"],
        "train.velocity": velocity,
        "train.loss": loss[None],
        "train.grad.class_emb_norm": grads[0].norm()[None],
        "train.grad.enc0_qkv": grads[1],
        "train.grad.last_ada": grads[2],
    }
    golden.check("train", results, inputs=("train.latents", "train.labels", "train.label_drop_u", "train.t_normal", "train.noise"))


@torch.no_grad()
def test_velocities_through_the_cache(model, golden):
    io = golden.io
    condition, (t0, t1) = _condition(model, io["velocity.labels"]), io["velocity.t"]
    rows, n = len(condition.labels), io["velocity.z0"].shape[1]
    cache = model.new_cache(rows)
    a = model(io["velocity.x0"], condition, times=t0.expand(rows, 1), cache=cache)
    both = torch.stack([torch.tensor(0.0), t0]).expand(rows, 2)
    b = model(torch.cat([io["velocity.z0"], io["velocity.x1"]], dim=1), condition, times=both, cache=cache)[:, n:]
    cache.advance(n)
    c = model(io["velocity.x1"], condition, times=t1.expand(rows, 1), cache=cache)
    results = {"velocity.a": a, "velocity.b": b, "velocity.c": c, "velocity.k_cache_enc0": cache.keys[0][:, :, :n]}
    golden.check("velocity", results, inputs=("velocity.labels", "velocity.t", "velocity.x0", "velocity.x1", "velocity.z0"))


@pytest.mark.parametrize("kind, solver", [("sde", "euler_maruyama"), ("ode", "euler")])
def test_complete_runs_of_the_samplers(model, golden, kind, solver):
    io, config, group = golden.io, golden.spec["config"], f"sample_{kind}"

    def noise(entity, number):
        return io[f"{group}.init_noise"][entity] if number == 0 else io[f"{group}.sde_noise"][entity][number - 1]

    seen = []
    tokens = model.sample(
        _condition(model, io["sample.labels"]),
        noise=noise,
        sampling=FlowSampling(num_steps=config[f"{kind}_steps"], solver=solver),
        guidance_scale=config["cfg_scale"],
        on_step=lambda entity, slots: seen.append(slots[:, model.order.entity(entity)]),
    )
    h, w = model.layout.shape
    results = {f"{group}.entities": torch.stack(seen), f"{group}.latents": tokens.values.transpose(1, 2).unflatten(2, (h, w))}
    golden.check(group, results, inputs=(f"{group}.init_noise", f"{group}.sde_noise"))
    assert config[f"model_calls_{kind}"] == config[f"{kind}_steps"] * model.order.num_entities


def test_the_labels_of_the_runs_are_known(golden):
    golden.check("sample", {}, inputs=("sample.labels",))
