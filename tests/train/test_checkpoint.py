"Checkpoints of whole processes: killed while writing, damaged, read by timm alone, converted on the command line."

import json
import os
import signal
import subprocess
import sys

import pytest
import timm.optim
import torch
from safetensors.torch import load_file, save_file

from cmid.base.errors import CmidError
from cmid.base.runtime import provenance
from cmid.method.backbones import create
from cmid.train.checkpoint import checkpoints, export_backbone, latest, load, load_backbone, save
from cmid.train.convert import PREFIX, STUDY, from_cmid, to_cmid, to_published

SWIN = "swin_tiny_patch4_window7_224"
SMALL = "test_resnet"  # timm's smallest
FACTS = STUDY | dict(method="random", parameters=dict(lr=0.1), data_hash="0", data_licence=None, health={})


def python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)


def convert(*args):  # called as a console script calls it: from the body of a file that is run
    script = "import sys\nfrom cmid.train.convert import cmid_convert\nsys.exit(cmid_convert())\n"
    path = args[0]
    path.write_text(script)
    return subprocess.run([sys.executable, str(path), *map(str, args[1:])], capture_output=True, text=True)


@pytest.mark.slow
def test_killed_while_writing_the_old_one_stays(tmp_path):
    save(tmp_path / "epoch_1.ckpt", dict(w=torch.ones(3)), dict(parameters={}))
    code = """
import sys, torch
from pathlib import Path
import cmid.train.checkpoint as c
write = torch.save
def half(o, f): write(o, f); f.truncate(f.tell()//2); f.flush(); print('half', flush=True); import time; time.sleep(600)
torch.save = half
c.save(Path(sys.argv[1])/'epoch_2.ckpt', dict(w=torch.zeros(10**5)), dict(parameters={}))"""
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "half\n"
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch_1.ckpt"]
    assert list(tmp_path.glob(".*.part"))
    assert torch.equal(latest(tmp_path)[1]["w"], torch.ones(3))
    save(tmp_path / "epoch_3.ckpt", dict(w=torch.zeros(3)), dict(parameters={}))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch_1.ckpt",
        "epoch_3.ckpt",
    ]  # what the killed one left is gone


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_any_cut_falls_back(tmp_path, share, capsys):
    for i in (1, 2):
        save(tmp_path / f"epoch_{i}.ckpt", dict(w=torch.full((1000,), i)), dict(parameters={}))
    new = tmp_path / "epoch_2.ckpt"
    whole = new.read_bytes()
    new.write_bytes(whole[: int(len(whole) * share)])
    path, state, _ = latest(tmp_path)
    assert path.name == "epoch_1.ckpt"
    assert (state["w"] == 1).all()
    assert capsys.readouterr().err.count("\n") == 1


def test_optimiser_goes_on_bit_for_bit(tmp_path):
    def run(net, opt, steps):
        for i in steps:
            opt.zero_grad()
            net(torch.full((2, 3), i + 1.0)).square().sum().backward()
            opt.step()
        return net.weight.detach().clone()

    def fresh():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        return net, timm.optim.Adan(net.parameters(), lr=0.1)

    straight = run(*fresh(), range(6))
    net, opt = fresh()
    run(net, opt, range(3))
    save(tmp_path / "step_3.ckpt", dict(net=net.state_dict(), opt=opt.state_dict()), dict(parameters={}))
    torch.manual_seed(1)
    net = torch.nn.Linear(3, 2)
    opt = timm.optim.Adan(net.parameters(), lr=0.5)
    state, _ = load(tmp_path / "step_3.ckpt")
    net.load_state_dict(state["net"])
    opt.load_state_dict(state["opt"])
    assert torch.equal(run(net, opt, range(3, 6)), straight)


def test_other_parameters_are_refused_by_name(tmp_path):
    save(tmp_path / "a_1.ckpt", {}, dict(parameters=dict(pretrain=dict(lr=0.1, betas=[0.9, 0.99]))))
    load(tmp_path / "a_1.ckpt", dict(pretrain=dict(lr=0.1, betas=(0.9, 0.99))))
    with pytest.raises(CmidError, match=r"a_1.ckpt.*pretrain\.lr: 0\.1 then, 0\.2 now") as e:
        load(tmp_path / "a_1.ckpt", dict(pretrain=dict(lr=0.2, betas=[0.9, 0.99])))
    assert "betas" not in str(e.value)
    assert "\n" not in str(e.value)


LOAD = """
import sys, timm, torch
for folder in sys.argv[1:]:
    io = torch.load(folder + '/io.pt', weights_only=True)
    file = folder + '/b/model.safetensors'
    m = timm.create_model(io['name'], num_classes=0, checkpoint_path=file, **io['size']).eval()
    with torch.no_grad():
        assert torch.allclose(m(io['x']), io['y'], rtol=0, atol=1e-5 * io['y'].abs().max().item()), io['name']
assert 'cmid' not in sys.modules"""


@pytest.mark.slow
def test_timm_loads_exports_in_another_process(tmp_path):
    side = dict(img_size=128)
    sizes = {"resnet18": {}, SWIN: side, "vit_small_patch16_224": side}
    for name, size in sizes.items():
        torch.manual_seed(0)
        encoder = create(name, in_chans=3, img_size=128).eval()
        export_backbone(encoder, tmp_path / name / "b", FACTS | dict(provenance=provenance()))
        x = torch.randn(1, 3, 128, 128)
        with torch.no_grad():
            y = encoder.model(x)
        torch.save(dict(x=x, y=y, name=name, size=size), tmp_path / name / "io.pt")
    done = python(LOAD, *(tmp_path / name for name in sizes))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_weights_have_the_mode_of_other_files(umask, tmp_path):
    before = os.umask(umask)
    try:
        export_backbone(create(SMALL, in_chans=3, img_size=64), tmp_path / "b", FACTS | dict(provenance=provenance()))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "b").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert "model.safetensors" in modes


EXPORT = """
import sys, torch, json
from cmid.method.backbones import create
from cmid.train.checkpoint import export_backbone
torch.manual_seed(0)
extras = dict(b=torch.ones(2), a=torch.zeros(3))
export_backbone(create('resnet18', img_size=64), sys.argv[1], json.loads(sys.argv[2]), extras=extras)"""


@pytest.mark.slow
def test_exports_of_two_processes_are_the_same_bytes(tmp_path):
    facts = FACTS | dict(provenance={})
    assert python(EXPORT, tmp_path / "there", json.dumps(facts)).returncode == 0
    torch.manual_seed(0)
    extras = dict(a=torch.zeros(3), b=torch.ones(2))
    export_backbone(create("resnet18", img_size=64), tmp_path / "here", facts, extras=extras)
    files = sorted((tmp_path / "there").iterdir())
    assert files
    for path in files:
        assert path.read_bytes() == (tmp_path / "here" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_converts_both_ways_on_the_command_line(tmp_path):
    e = create(SWIN)
    torch.nn.init.normal_(e.mask_token)
    release = {f"{PREFIX}model.{k}": v for k, v in to_published(e.model.state_dict()).items()} | {
        f"{PREFIX}mask_token": e.mask_token.data
    }
    torch.save(release, tmp_path / "r.pth")
    script = tmp_path / "cmid_convert.py"
    done = convert(script, tmp_path / "r.pth", tmp_path / "b", "--backbone", SWIN)
    assert done.returncode == 0, done.stderr
    done = convert(script, tmp_path / "b", tmp_path / "back.pth", "--direction", "from_cmid")
    assert done.returncode == 0, done.stderr
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == release.keys()
    assert all(torch.equal(back[key], release[key]) for key in back)
    loaded, card = load_backbone(tmp_path / "b")
    assert card.mean == STUDY["mean"]
    assert all(torch.equal(value, e.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_resnet_keys_pass_as_they_are(tmp_path):
    e = create("resnet18")
    torch.save({f"{PREFIX}model.{k}": v for k, v in e.model.state_dict().items()}, tmp_path / "r.pth")
    to_cmid(tmp_path / "r.pth", tmp_path / "b", "resnet18")
    from_cmid(tmp_path / "b", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.pop(f"{PREFIX}mask_token").eq(0).all()
    assert all(torch.equal(back[f"{PREFIX}model.{key}"], value) for key, value in e.model.state_dict().items())


# Weights of a network that was wrapped: trained in several processes, or compiled


def compiled_in_processes(network):
    return torch.nn.DataParallel(torch.compile(network))


WRAPPED = {
    "processes": (torch.nn.DataParallel, ["module."]),
    "compiled": (torch.compile, ["_orig_mod."]),
    "both": (compiled_in_processes, ["module.", "_orig_mod."]),
}


@pytest.fixture(params=WRAPPED)
def wrapped(request):
    "A network, its weights as they are saved, and the prefixes of their keys."
    encoder = create(SMALL)
    wrap, prefixes = WRAPPED[request.param]
    weights = wrap(encoder.model).state_dict()
    assert all(key.startswith("".join(prefixes)) for key in weights)
    return encoder, weights, prefixes


def said_of(path, prefixes, count):
    return [f"note: {path}: {prefix} is removed from its {count} keys" for prefix in prefixes]


def test_a_wrapped_network_is_converted(wrapped, tmp_path, capsys):
    encoder, weights, prefixes = wrapped
    torch.save(dict(state_dict=weights, epoch=3), tmp_path / "r.pth")
    to_cmid(tmp_path / "r.pth", tmp_path / "b", SMALL)
    assert capsys.readouterr().err.splitlines() == said_of(tmp_path / "r.pth", prefixes, len(weights))
    loaded, _ = load_backbone(tmp_path / "b")
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_a_wrapped_backbone_is_loaded(wrapped, branch, tmp_path, capsys):
    encoder, weights, prefixes = wrapped
    folder = export_backbone(encoder, tmp_path / "b", FACTS | dict(provenance={}), teacher=encoder)
    file = folder / ("model.safetensors" if branch == "student" else "teacher.safetensors")
    save_file({key: value.clone() for key, value in weights.items()}, file)
    loaded, _ = load_backbone(folder, branch=branch)
    assert capsys.readouterr().err.splitlines() == said_of(file, prefixes, len(weights))
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_keys_of_two_networks_are_refused(prefix, tmp_path):
    encoder = create(SMALL)
    folder = export_backbone(encoder, tmp_path / "b", FACTS | dict(provenance={}))
    weights = load_file(folder / "model.safetensors")
    key = sorted(weights)[0]
    weights[prefix + key] = weights[key].clone()
    save_file(weights, folder / "model.safetensors")
    torch.save(weights, tmp_path / "r.pth")
    for load_weights in (
        lambda: load_backbone(folder),
        lambda: to_cmid(tmp_path / "r.pth", tmp_path / "c", SMALL),
    ):
        with pytest.raises(CmidError) as e:
            load_weights()
        assert f"1 keys begin with {prefix} ({prefix}{key}) and {len(weights) - 1} do not" in str(e.value)
    assert not (tmp_path / "c").exists()


def test_a_file_without_names_is_no_state_dict(tmp_path):
    torch.save({0: torch.ones(1)}, tmp_path / "r.pth")
    with pytest.raises(CmidError, match="r.pth: holds no state dict"):
        to_cmid(tmp_path / "r.pth", tmp_path / "b", SMALL)
