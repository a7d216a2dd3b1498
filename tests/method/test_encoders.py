"Encoders of any timm network: maps, strides, what is trained, what is stored, and what is refused."

import pytest
import timm
import torch

from cmid.base.errors import CmidError
from cmid.method.backbones import STRIDES, Pyramid, create, like_resnet
from cmid.method.model import CMID
from cmid.train.checkpoint import export_backbone, load_backbone
from cmid.train.convert import STUDY

FACTS = STUDY | dict(method="random", parameters={}, data_hash=None, data_licence=None, provenance={}, health={})
OTHERS = "tf_efficientnet_lite0", "convnext_atto", "regnetx_002", "mobilenetv3_small_050", "ese_vovnet19b_slim_dw"


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_of_another_family_gives_a_pyramid_and_comes_back_from_its_folder(tmp_path, name):
    torch.manual_seed(0)
    encoder = create(name, in_chans=4, img_size=64, drop_path_rate=0.1).eval()
    images = torch.randn(2, 4, 64, 96)
    maps = Pyramid(encoder)(images)
    assert [tuple(o.shape[2:]) for o in maps] == [(64 // s, 96 // s) for s in STRIDES]
    assert [o.shape[1] for o in maps] == encoder.feature_channels
    facts = FACTS | dict(bands=list("rgbn"), mean=[0.5] * 4, std=[0.2] * 4)
    loaded, card = load_backbone(export_backbone(encoder, tmp_path / "it", facts))
    assert card.architecture == name
    assert all(torch.equal(a, b) for a, b in zip(maps, loaded(images), strict=True))


@pytest.mark.parametrize("name", [*OTHERS, "resnet10t", "swin_tiny_patch4_window7_224", "deit3_small_patch16_224"])
def test_the_text_in_the_folder_opens_the_network_with_timm_alone(tmp_path, monkeypatch, name):
    encoder = create(name, img_size=64).eval()
    folder = export_backbone(encoder, tmp_path / "it", FACTS)
    text = (folder / "README.md").read_text()
    monkeypatch.chdir(folder)
    names = {}
    exec(text.partition("```python\n")[2].partition("\n\n")[0], names)  # noqa: S102
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = names["model"].eval().forward_features(images)
        assert torch.equal(found, encoder.model.forward_features(images))


@pytest.mark.parametrize("name", OTHERS)
def test_every_trained_parameter_gets_a_gradient_and_the_rest_keeps_its_statistics(name):
    before = timm.create_model(name, num_classes=0).state_dict()
    encoder = create(name, img_size=64)
    fresh = {key: value for key, value in encoder.model.state_dict().items() if "running" in key}
    assert all(torch.equal(value, before[key]) for key, value in fresh.items()), "building it updates nothing"
    sum(o.square().mean() for o in encoder(torch.randn(2, 3, 64, 64))).backward()
    assert [key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any(p.requires_grad for p in encoder.parameters())


def test_random_weights_follow_from_the_seed():
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(create("tf_efficientnet_lite0", img_size=64).state_dict())
    assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])


def test_stochastic_depth_is_on_where_a_network_has_it_and_said_where_not(capsys):
    with_depth = create("convnext_atto", img_size=64, drop_path_rate=0.5)
    rates = [m.drop_prob for m in with_depth.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.5)
    assert capsys.readouterr().err == ""
    create("densenet121", img_size=64, drop_path_rate=0.5)
    assert "densenet121 has no stochastic depth: drop_path 0.5 is not used" in capsys.readouterr().err


def test_such_a_network_cannot_be_pretrained():
    encoder = create("convnext_atto", img_size=64)
    with pytest.raises(CmidError, match="it has no mask token, so it takes no masks"):
        encoder(torch.zeros(1, 3, 64, 64), torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(CmidError, match="neither ResNet, Swin nor ViT: it can be a baseline, but cannot be pretrained"):
        CMID("convnext_atto", img_size=64)


@pytest.mark.parametrize(
    "name, side, message",
    [
        ("convnext_atom", 64, "unknown to timm \\(did you mean 'convnext_atto'"),
        ("convnext_atto.in9k", 64, "has no weights 'in9k' in timm"),
        ("inception_v3", 96, "which has no whole stride"),
        ("inception_v3", 32, "cannot take images of 32 x 32 px"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name, side, message):
    with pytest.raises(CmidError, match=message) as raised:
        create(name, img_size=side)
    assert "\n" not in str(raised.value)


def test_a_pyramid_of_other_strides_is_refused():
    encoder = create("shvit_s1", img_size=64)
    assert encoder.strides == [16, 32]
    with pytest.raises(CmidError, match=r"shvit_s1: has maps at strides \[16, 32\]"):
        Pyramid(encoder)


def test_batch_norm_decides_whose_published_values_are_used():
    like = {name: like_resnet(name) for name in ("resnet50", "tf_efficientnet_lite0", "regnety_002", "convnext_atto")}
    assert like == dict(resnet50=True, tf_efficientnet_lite0=True, regnety_002=True, convnext_atto=False)
    assert not like_resnet("vit_small_patch16_224")
