"""Networks that others wrote: pruned to 30 % of their MACs, trained, saved, loaded, exported."""

import sys

import onnxruntime
import pytest
import torch
from torch import nn
from torchvision import models

from mtprune_utils import Pruner, load_pretrained, save_pretrained
from mtprune_utils.core.groups import outputs_of
from mtprune_utils.files import PROJECT

sys.path.append(str(PROJECT / ".venv" / "foreign"))  # see FOREIGN in Makefile

import segmentation_models_pytorch as smp
import timm

segmentation = models.segmentation


class Network(nn.Module):
    """Some trunk, and what reads its features."""

    def __init__(self, trunk, *heads, pooled=False):
        super().__init__()
        self.trunk, self.heads, self.pooled = trunk, nn.ModuleList(heads), pooled

    def forward(self, x):
        features = self.trunk(x)
        if self.pooled:
            return {"map": self.heads[0](features), "class": self.heads[1](features.mean((2, 3)))}
        return tuple(head(features) for head in self.heads)


class DeepLab(nn.Module):
    def __init__(self):
        super().__init__()
        network = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
        self.trunk = network.backbone
        self.classes = segmentation.deeplabv3.DeepLabHead(2048, 5)
        self.depth = segmentation.deeplabv3.DeepLabHead(2048, 1)

    def forward(self, images):
        features = self.trunk(images)["out"]
        return {"classes": self.classes(features), "depth": self.depth(features)}


def lraspp():
    """Its heads read two of the trunk's feature maps."""
    networks = [
        segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=n)
        for n in (5, 1)
    ]
    return Network(networks[0].backbone, *(network.classifier for network in networks))


class UNet(nn.Module):
    """Both heads read what the decoder makes: encoder and decoder are the trunk."""

    def __init__(self):
        super().__init__()
        network = smp.Unet("resnet18", encoder_weights=None)
        self.encoder, self.decoder = network.encoder, network.decoder
        self.classes, self.depth = nn.Conv2d(16, 5, 3, padding=1), nn.Conv2d(16, 1, 1)

    def forward(self, images):
        features = self.decoder(self.encoder(images))
        return {"classes": self.classes(features), "depth": self.depth(features)}


def of_timm(name, channels):
    trunk = timm.create_model(name, pretrained=False, num_classes=0, global_pool="")
    return Network(trunk, nn.Conv2d(channels, 5, 1), nn.Linear(channels, 3), pooled=True)


def convnext():
    return of_timm("convnext_atto", 320)


def efficientnet():
    return of_timm("efficientnet_b0", 1280)


def mlp():
    layers = (nn.Flatten(), nn.Linear(3 * 64 * 64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    return Network(nn.Sequential(*layers), nn.Linear(32, 2), nn.Linear(32, 3))


def vit(hidden=768):
    """Only hidden units of its perceptrons can go: 30 % is in reach where these are wide."""
    trunk = models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=hidden
    )
    trunk.heads = nn.Identity()
    return Network(trunk, nn.Linear(48, 2), nn.Linear(48, 3))


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BUILDERS = {  # with the trunk's name; None: what all outputs share
    "DeepLabV3-ResNet50": (DeepLab, "trunk"),
    "LR-ASPP-MobileNetV3": (lraspp, "trunk"),
    "U-Net": (UNet, None),
    "ConvNeXt": (convnext, "trunk"),
    "EfficientNet": (efficientnet, "trunk"),
    "MLP": (mlp, "trunk"),
    "ViT": (vit, "trunk"),
}


def step(pruner, model, optimizer):
    optimizer.zero_grad()
    outputs = outputs_of(model(IMAGES))
    losses = {task: (output - 1).square().mean() for task, output in outputs.items()}
    pruner.backward(losses)
    optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", BUILDERS)
def test_pruned_to_30_percent_trained_saved_loaded_and_exported(name, tmp_path):
    torch.manual_seed(0)
    builder, trunk = BUILDERS[name]
    model = builder().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    pruner = Pruner(model, (IMAGES,), trunk, "cosprune")
    step(pruner, model, optimizer)
    size = pruner.prune(macs=0.3, optimizer=optimizer)
    assert 0.25 * pruner.dense["macs"] < size["macs"] <= 0.3 * pruner.dense["macs"]
    assert size["parameters"] == sum(p.numel() for p in model.parameters())
    step(pruner, model, optimizer)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    save_pretrained(model.eval(), tmp_path)
    loaded = load_pretrained(tmp_path, builder)
    with torch.no_grad():
        outputs = outputs_of(model(IMAGES))
        for task, output in outputs_of(loaded(IMAGES)).items():
            assert torch.equal(output, outputs[task])
    path = tmp_path / "model.onnx"
    torch.onnx.export(loaded, (IMAGES,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    exported = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    for ours, theirs in zip(outputs.values(), exported, strict=True):
        assert (ours - torch.from_numpy(theirs)).abs().max() < 1e-4 * ours.abs().max()


def test_attention_is_left_alone_counted_and_said_to_be_so():
    model = vit(hidden=96).eval()
    pruner = Pruner(model, (IMAGES,), "trunk", "l1")
    block = "trunk.encoder.layers.encoder_layer_{}."
    assert list(pruner.widths()) == [f"{block}mlp.0".format(i) for i in range(3)]
    for i in range(3):
        reason = pruner.left_alone[f"{block}self_attention.out_proj".format(i)]
        assert "takes its weight without calling it" in reason
    assert (
        "self_attention, a MultiheadAttention, which cannot be cut"
        in (pruner.left_alone["trunk.conv_proj"])
    )
    tokens, width = 17, 48
    embedding = 16 * 3 * 16 * 16 * width
    attention = 3 * (tokens * 4 * width * width + 2 * tokens * tokens * width)
    units = 3 * tokens * 2 * width  # per hidden unit in each block
    heads = width * (2 + 3)
    assert pruner.dense["macs"] == embedding + attention + 96 * units + heads
    left = (embedding + attention + units + heads) / pruner.dense["macs"]
    with pytest.raises(ValueError, match=f"cannot come down to 0.3: .* {left:.3f} is left"):
        pruner.prune(macs=0.3, optimizer=None)
    assert pruner.prune(macs=0.9, optimizer=None)["macs"] <= 0.9 * pruner.dense["macs"]
