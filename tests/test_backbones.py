"""Backbones: which there are, the images they take, what they start from, and which of their layers train."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import dataset
import inference
import train
from conftest import BACKBONES, SMALL, classifier_of, files_of, refused, size_for
from dataset import InputError

# Of several blocks each, in a network of a few million parameters or without values.
SOME = ["convnext_tiny", "efficientnet_b0", "mnasnet0_5", "regnet_y_400mf", "swin_t", "swin_v2_t", "vit_b_32"]


def without_values(backbone, size=None):
    """Return a network on the meta device."""
    return inference.build_without_values(backbone, size or size_for(backbone))


def with_values(backbone, size, seed=0, count=3):
    """Return a network with random weights, for `count` classes, in eval mode."""
    torch.manual_seed(seed)
    return inference.build_model(backbone, "linear", count, size=size).eval()


# ----------------------------------------------------------------------------------------------------------
# Names


def test_backbones_lists_every_classification_network_of_torchvision(capsys):
    from torchvision import models

    listed = inference.main(["--backbones"])
    left_out = set(models.list_models(module=models)) - set(listed)
    assert left_out == {"squeezenet1_0", "squeezenet1_1"}
    assert not any(isinstance(layer, nn.Linear) for name in left_out for layer in models.get_model(name).modules())

    rows = {row.split()[0]: row.split() for row in capsys.readouterr().out.splitlines()}
    assert list(rows) == ["backbone", *listed]
    assert rows["resnet18"] == ["resnet18", "11.7", "M", "224", "px"]
    assert rows["efficientnet_v2_l"] == ["efficientnet_v2_l", "118.5", "M", "480", "px"]


@pytest.mark.parametrize("name, reason", [
    ("squeezenet1_1", "its classifier is a convolution"),
    ("fcn_resnet50", "torchvision.models.segmentation is not for the classification of images"),
    ("quantized_resnet18", "torchvision.models.quantization is not for"),
    ("r3d_18", "torchvision.models.video is not for"),
    ("resnet17", r"torchvision has no such classification network \(did you mean resnet1"),
    ("vit", r"torchvision has no such classification network \(did you mean vit_b_16 or vit_b_32 or vit_h_14\?"),
    ("x", "torchvision has no such classification network: python inference.py --backbones lists them"),
])
def test_what_is_no_backbone_is_refused_with_the_reason(name, reason, demo, tmp_path, capsys):
    with pytest.raises(InputError, match=f"--backbone {name}: {reason}"):
        inference.build_model(name, "linear", 3)
    error = refused(capsys, train.main, "--data", demo, "--out", tmp_path / "out", *SMALL, "--backbone", name)
    assert error.startswith(f"error: --backbone {name}: ")


def test_the_name_of_a_backbone_may_be_in_capitals():
    options = train.parse_options(["--backbone", "ConvNeXt_Tiny"])
    assert options.backbone == "convnext_tiny"


# ----------------------------------------------------------------------------------------------------------
# Images: sizes, and normalization


@pytest.mark.parametrize("backbone, size", [("resnet18", 224), ("efficientnet_v2_s", 384), ("inception_v3", 299),
                                            ("swin_v2_t", 256), ("vit_h_14", 518)])
def test_images_have_the_size_that_the_weights_expect_unless_another_is_asked_for(backbone, size):
    assert train.parse_options(["--backbone", backbone, "--lr-backbone", "1e-4"]).size == size
    assert train.parse_options(["--backbone", backbone, "--size", str(size + 224 * 14)]).size == size + 224 * 14


@pytest.mark.parametrize("backbone, size, nearest", [
    ("vit_b_16", 100, "96 or 112"), ("vit_b_32", 240, "224 or 256"), ("vit_h_14", 224 - 1, "210 or 224"),
    ("maxvit_t", 225, "224 or 448"), ("maxvit_t", 64, "224"), ("inception_v3", 64, "80"), ("alexnet", 32, "64"),
])
def test_a_size_that_a_backbone_does_not_take_is_an_error_with_the_nearest(backbone, size, nearest, demo, tmp_path,
                                                                           capsys):
    error = refused(capsys, train.main, "--data", demo, "--out", tmp_path / "out", *SMALL, "--backbone", backbone,
                    "--size", size)
    assert f"--size {size}: {backbone} does not take images of this size, but of {nearest} pixels" in error


def test_images_are_normalized_as_the_weights_of_the_backbone_expect():
    pixels = torch.full((1, 3, 2, 2), 255 * 0.75)
    member = inference.Member(None, "efficientnet_v2_l", "linear", [0.0], 2, [0.0])
    torch.testing.assert_close(member.normalize(pixels), torch.full((1, 3, 2, 2), 0.5))  # (0.75 - 0.5) / 0.5
    member = inference.Member(None, "resnet18", "linear", [0.0], 2, [0.0])
    assert torch.equal(member.normalize(pixels), dataset.normalize(pixels))


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_members_of_a_classifier_have_their_own_normalization(mean, monkeypatch):
    class Mean(nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3))[:, None]

    expected = {"a": (2, (0.0,) * 3, (1.0,) * 3), "b": (2, (mean,) * 3, (0.5,) * 3)}
    monkeypatch.setattr(inference, "pretrained_input", lambda name: inference.PretrainedInput(*expected[name]))
    members = [inference.Member(Mean(), name, "linear", [0.0], 2, [0.0]) for name in "ab"]
    classifier = inference.Classifier(members, ["x"], {}, [0.5], precision=torch.float32)
    image = np.full((2, 2, 3), 102, np.uint8)
    logits = [0.4, (0.4 - mean) / 0.5]
    np.testing.assert_allclose(inference.predict(classifier, image)[0, 0],
                               np.mean([1 / (1 + math.exp(-one)) for one in logits]), rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("backbone", BACKBONES)
def test_networks_without_values_are_those_with_values(backbone, real_networks):
    """Also what is computed instead of learned, which no file contains, has values."""
    with inference.WithoutValues():
        network = inference.build_model(backbone, "linear", 3, size=size_for(backbone))
    own = {name for name, _ in network.named_buffers()} - network.state_dict().keys()
    assert not any(dict(network.named_buffers())[name].is_meta for name in own)
    assert {name for name, tensor in network.state_dict().items() if tensor.is_meta}
    inference.load_tensors(network, network.state_dict(), assign=True)  # MNASNet asks for a version


def test_places_of_a_vit_are_interpolated_to_other_sizes(tmp_path):
    small, large = with_values("vit_b_32", 64), with_values("vit_b_32", 128, seed=1)
    torch.save(small.state_dict(), tmp_path / "w.pth")
    before = large.encoder.pos_embedding.detach().clone()
    taken, skipped, _ = inference.load_weights(large, tmp_path / "w.pth", "vit_b_32")
    assert skipped == {} and "encoder.pos_embedding" in taken

    places, expected = large.encoder.pos_embedding[0, 1:], small.encoder.pos_embedding[0, 1:]
    expected = nn.functional.interpolate(expected.T.reshape(1, 768, 2, 2), (4, 4), mode="bicubic", align_corners=True)
    torch.testing.assert_close(places, expected[0].flatten(1).T)
    assert torch.equal(large.encoder.pos_embedding[:, 0], small.encoder.pos_embedding[:, 0])
    assert not torch.equal(large.encoder.pos_embedding, before)


def test_the_file_of_another_size_of_a_convnext_is_named(tmp_path):
    with torch.device("meta"):
        state = inference.build_model("convnext_small", "linear", 3).state_dict()
        network = inference.build_model("swin_t", "linear", 3)
    with pytest.raises(InputError, match="it looks like convnext_small"):
        inference.load_weights(network, inference.Weights("w.pth", state, [], []), "swin_t")


@pytest.mark.parametrize("saved, wanted, size", [("vit_l_16", "vit_l_32", 64), ("vit_l_32", "vit_l_16", 224)])
def test_a_vit_with_patches_of_another_size_is_named(saved, wanted, size):
    """Only the first of hundreds of tensors has another shape, and the vectors of places are interpolated."""
    weights = inference.Weights("w.pth", with_places(saved, 64), [], [])
    with pytest.raises(InputError, match=f"it looks like {saved}"):
        inference.load_weights(without_values(wanted, size), weights, wanted)


def with_places(backbone, size):
    """Return the state_dict of a ViT in which only the vectors of places have values."""
    state = without_values(backbone, size).state_dict()
    return state | {"encoder.pos_embedding": torch.zeros(state["encoder.pos_embedding"].shape)}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("backbone", ["googlenet", "inception_v3"])
def test_auxiliary_heads_in_a_file_are_ignored(backbone, prefix):
    """They are in the files of torchvision: more than half of GoogLeNet's weights."""
    from torchvision import models

    with torch.device("meta"):
        state = models.get_model(backbone, weights=None, init_weights=False, aux_logits=True).state_dict()
    weights = inference.Weights("w.pth", {prefix + name: tensor for name, tensor in state.items()}, [], [])
    network = without_values(backbone)
    taken, skipped, _ = inference.load_weights(network, weights, backbone)
    assert set(taken) == {name for name in network.state_dict() if not name.startswith("fc.")}
    assert set(skipped) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("saved, wanted", [("resnet18", "resnet34"), ("convnext_tiny", "convnext_small"),
                                           ("swin_t", "swin_s")])
def test_all_of_a_smaller_network_is_refused_and_its_first_layers_are_taken(saved, wanted, real_networks):
    state, network = without_values(saved, 224).state_dict(), without_values(wanted, 224)
    with pytest.raises(InputError, match=f"only a part of the weights of {wanted}: it looks like {saved}: give "):
        inference.load_weights(network, inference.Weights("w.pth", state, [], []), wanted)

    for name in [name for name in state if name.startswith(("layer4", "features.7"))]:
        del state[name]
    taken, _, _ = inference.load_weights(network, inference.Weights("w.pth", state, [], []), wanted)
    assert len(taken) > 50


# ----------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("argv, rate", [
    (["--backbone", "convnext_tiny"], 5e-5), (["--backbone", "swin_t"], 5e-5), (["--backbone", "vit_b_16"], 5e-5),
    (["--backbone", "vgg16"], 5e-5), (["--backbone", "resnet18"], 1e-3), (["--backbone", "maxvit_t"], 1e-3),
    (["--backbone", "swin_t", "--weights", "none"], 1e-3), (["--backbone", "swin_t", "--lr", "1e-5"], 1e-5),
    (["--backbone", "swin_t", "--preset", "coco"], 1e-3), (["--backbone", "swin_t", "--lr-backbone", "0.1"], 0.1),
])
def test_pretrained_backbones_without_batchnorm_train_at_a_low_rate(argv, rate, real_networks):
    assert train.parse_options(argv).lr_backbone == rate


@pytest.mark.parametrize("backbone", SOME)
def test_weight_decay_spares_norms_and_biases_of_networks_without_batchnorm(backbone):
    network = without_values(backbone)
    names = {id(weight): name for name, weight in network.named_parameters()}
    groups = [{names[id(weight)] for weight in group["params"]} for group in train.parameter_groups(network)]
    head = inference.head_name(network) + "."
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    assert all(name.startswith(head) == number % 2 for number, group in enumerate(groups) for name in group)
    if backbone in ("efficientnet_b0", "mnasnet0_5", "regnet_y_400mf"):
        assert len(groups) == 2
        return

    norms = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.LayerNorm)}
    tables = {name for name in names.values() if name.rpartition(".")[2] in
              ("layer_scale", "class_token", "pos_embedding", "relative_position_bias_table", "logit_scale")}
    biases = {name for name in names.values() if name.endswith("bias")}
    assert groups[2] | groups[3] == norms | tables | biases
    assert len(norms) > 10


def test_rates_and_weight_decay_reach_their_groups(few_images, tmp_path):
    options = train.parse_options(["--data", str(few_images), "--out", str(tmp_path / "out"), *SMALL, "--backbone",
                                   "convnext_tiny", "--weights", "none", "--schedule", "constant", "--wd", "0.3",
                                   "--lr", "0.01", "--lr-backbone", "0.001"])
    run = train.build(options, train.read_data(options))
    train.set_rates(run, 0.5)
    assert [(group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups] == [
        (0.001, 0.3), (0.01, 0.3), (0.001, 0.0), (0.01, 0.0)]


@pytest.mark.parametrize("backbone", SOME)
def test_frozen_layers_compute_the_same_every_time(backbone):
    """Stochastic depth and dropout are off there; they would also be wrong in the first layers of `late`."""
    size = size_for(backbone)
    network = with_values(backbone, size)
    kept = []
    head = network.get_submodule(inference.head_name(network))
    head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    images = torch.randn(8, 3, size, size)
    for names in ({""}, set()):  # all layers train, or only the head
        for name, weight in network.named_parameters():
            weight.requires_grad_(bool(names) or name.startswith(inference.head_name(network)))
        train.train_mode(network)
        with torch.no_grad():
            network(images)
            network(images)
    assert torch.equal(kept[2], kept[3])
    random = [layer for layer in network.modules() if type(layer).__name__ in ("StochasticDepth", "Dropout")
              and layer.p > 0]
    assert torch.equal(kept[0], kept[1]) == (not random)


@pytest.mark.parametrize("backbone, first", [
    ("resnet18", "layer3.0.conv1.weight"), ("convnext_tiny", "features.5.0.layer_scale"),
    ("vit_b_32", "encoder.layers.encoder_layer_0.mlp.0.weight"), ("swin_t", "features.5.0.norm1.weight"),
    ("maxvit_t", "blocks.2.layers.0.layers.window_attention."), ("regnet_y_400mf", "trunk_output.block3"),
])
def test_late_layers_begin_inside_nested_blocks(backbone, first, real_networks):
    network = without_values(backbone, 224)
    late = train.late_parameters(network)
    assert late[0].startswith(first)


@pytest.mark.parametrize("layers", ["encoder.layers.encoder_layer_11,head", "encoder.layers.encoder_layer_11.mlp"])
def test_layers_inside_blocks_can_be_named(layers):
    chosen = train.select_parameters(without_values("vit_b_32"), layers)
    assert {name.split(".")[2] for name in chosen if name.startswith("encoder")} == {"encoder_layer_11"}
    assert ("heads.head.weight" in chosen) == layers.endswith("head")


def test_the_layers_of_a_vit_are_named_when_one_does_not_exist():
    with pytest.raises(InputError, match=r"has no layer layer4; it has all, .*encoder.layers.encoder_layer_11"):
        train.select_parameters(without_values("vit_b_32"), "layer4")


@pytest.mark.parametrize("backbone", ["mnasnet0_5", "regnet_y_400mf"])
def test_a_run_with_another_backbone_is_resumed_and_predicts(backbone, few_images, tmp_path):
    options = ["--data", str(few_images), "--out", str(tmp_path / "out"), *SMALL, "--backbone", backbone,
               "--size", "32", "--epochs"]
    train.main([*options, "1"])
    train.main([*options, "2", "--resume"])
    assert inference.main([str(few_images / "images"), "--model", str(tmp_path / "out" / "model.pth"),
                           "--device", "cpu", "-j", "0"]).shape[1] == 2


def test_a_run_is_not_resumed_with_other_layers(few_images, tmp_path, capsys):
    options = ["--data", str(few_images), "--out", str(tmp_path / "out"), *SMALL, "--epochs", "1"]
    train.main(options)
    before = files_of(tmp_path / "out")
    error = refused(capsys, train.main, *options, "--epochs", "2", "--resume", "--dropout", "0.5", warns=True)
    assert "last.pth has --size 32 and --dropout 0.0: give the same" in error
    assert files_of(tmp_path / "out") == before


def test_a_run_of_a_version_with_other_groups_of_parameters_is_not_resumed(few_images, tmp_path, capsys):
    options = ["--data", few_images, "--out", tmp_path / "out", *SMALL, "--epochs"]
    train.main([*map(str, options), "1"])
    last = torch.load(tmp_path / "out" / "last.pth", weights_only=True)
    last["optimizer"]["param_groups"].append({"params": []})
    torch.save(last, tmp_path / "out" / "last.pth")
    error = refused(capsys, train.main, *options, 2, "--resume", warns=True)
    assert "last.pth was written by another version of train.py" in error


# ----------------------------------------------------------------------------------------------------------
# Heatmaps


@pytest.mark.parametrize("backbone, layer", [
    ("resnet18", "layer4"), ("densenet121", "features"), ("vgg11", "features"), ("efficientnet_b0", "features"),
    ("convnext_tiny", "features"), ("googlenet", "inception5b"), ("shufflenet_v2_x0_5", "conv5"), ("swin_t", "permute"),
    ("vit_b_32", "encoder.layers.encoder_layer_11.ln_1"),
])
def test_heatmaps_are_grad_cam_of_the_last_layer_with_places(backbone, layer, real_networks):
    """Selvaraju et al. 2017, equations 1 and 2, compared where the map is highest."""
    labels = list(range(12))  # of an untrained network, the maps of half of them are zero
    network = with_values(backbone, 96, count=12)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics are those of these images, or deep layers would be all but zero
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 96, 96))
    network.eval()
    classifier = classifier_of(network, backbone, "linear", [0.0], list(map(str, labels)), {}, [0.5] * 12, 96)
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    heat = inference.heatmaps(classifier, image, labels)

    kept = []
    network.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output))
    logits = network(dataset.normalize(torch.from_numpy(image).permute(2, 0, 1)[None]))[0]
    compared = 0
    for label in labels:
        gradient, maps = torch.autograd.grad(logits[label], kept[0], retain_graph=True)[0], kept[0].detach()
        if maps.dim() == 3:
            side = math.isqrt(maps.shape[1] - 1)
            gradient, maps = ((x[:, 1:].transpose(1, 2).reshape(1, -1, side, side)) for x in (gradient, maps))
        assert maps.shape[2] == 3
        cam = (gradient.mean((2, 3))[0, :, None, None] * maps[0]).sum(0).relu()
        highest, second = cam.flatten().topk(2).values
        if highest == 0:
            assert heat[label].max() == 0
        elif second < 0.8 * highest:  # smooth enlarging may exchange cells that are nearly as high
            middles = torch.from_numpy(heat[label][16::32, 16::32])  # of the 3 x 3 cells
            assert middles.argmax() == cam.argmax()
            compared += 1
    assert compared


def test_an_image_of_one_patch_has_no_places():
    network = with_values("vit_b_32", 32)
    classifier = classifier_of(network, "vit_b_32", "linear", [0.0], list("abc"), {}, [0.5] * 3, 32)
    heat = inference.heatmaps(classifier, np.zeros((32, 32, 3), np.uint8), [0, 1])
    assert heat.shape == (2, 32, 32) and not heat.any()
