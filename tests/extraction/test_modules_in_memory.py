"""`featcache.extract(module, ...)`: a network in memory is a backbone like one of a file."""

import pytest
import torch
from extracting import SIZE
from torch import nn
from torchvision.models import resnet18

import featcache
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.errors import BadInput
from featcache.extraction.images import load_input


class Net(nn.Module):
    """Two convolutions and a classifier, for images of one size alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 8, stride=8)
        self.second = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
        self.fc = nn.Linear(16, 5)

    def forward(self, images):
        """Map images [B, 3, SIZE, SIZE] to logits [B, 5]."""
        assert images.shape[2:] == (SIZE, SIZE)
        return self.fc(self.second(self.first(images)).mean((2, 3)))


@pytest.fixture
def options(scenes, tmp_path):
    return {
        "dataset": "voc", "root": scenes, "size": SIZE, "workers": 0, "device": "cpu", "dtype": "float32",
        "store": tmp_path / "s.zarr",
    }  # fmt: skip


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


def test_features_equal_the_modules_own_and_the_module_stays_as_it_is(net, options, capsys):
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    net.train()
    path = featcache.extract(net, features="pooled,first:spatial", **options, **half)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert "a module in memory" in capsys.readouterr().err
    store = featcache.open_store(path)
    identity = store.manifest.identity
    assert identity["arch"] == f"{Net.__module__}:Net" and identity["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    record = read_dataset("voc", options["root"], ["test"]).splits["test"][0]
    preprocessing = load_backbone(net, size=SIZE, **half).preprocessing
    images = preprocessing.normalise(load_input(record, preprocessing)[None])
    with torch.inference_mode():
        expected = net.second(net.first(images)).mean((2, 3))[0]
    got = torch.as_tensor(store["test"]["last:pooled"][0])
    assert torch.allclose(got, expected, atol=1e-6)
    # The same weights are the same store, others are not.
    again = featcache.extract(net, features="pooled,first:spatial", **options, **half)
    assert again == path and "is finished already" in capsys.readouterr().err
    with torch.no_grad():
        net.fc.bias += 1
    with pytest.raises(BadInput, match="weights_sha256"):
        featcache.extract(net, features="pooled,first:spatial", **options, **half)


def test_a_file_of_the_same_network_is_the_same_backbone(options, tmp_path):
    torch.manual_seed(0)
    module = resnet18()
    torch.save(module.state_dict(), tmp_path / "x.pth")
    named = load_backbone(tmp_path / "x.pth", arch="torchvision.models:resnet18", size=SIZE)
    held = load_backbone(module, size=SIZE)
    assert held.weights_sha256 == named.weights_sha256 and held.aliases == named.aliases
    assert held.arch == "torchvision.models.resnet:ResNet"
    assert load_backbone(nn.DataParallel(module), size=SIZE).weights_sha256 == held.weights_sha256
    assert load_backbone(module.half(), size=SIZE).trunk.conv1.weight.dtype == torch.float32
    layers = {layer.path for layer in featcache.layers(module.float(), size=SIZE)}
    assert {"layer4", "layer1.0.conv1"} <= layers


def test_probes_on_a_module_are_explained_through_it(net, options, tmp_path):
    path = featcache.extract(net, features="spatial,pooled", **options)
    grid = {
        "splits": {"train": "train", "val": "val", "test": "test"}, "select": {"metric": "map", "split": "val"},
        "probes": [{"features": "last:pooled", "head": "linear", "loss": "bce", "optimizer": {"type": "adam", "lr": 1e-3},
                    "epochs": 1, "batch_size": 16}],
    }  # fmt: skip
    featcache.train_probes(grid, store=path, run=tmp_path / "run")
    given = {"dataset": "voc", "root": options["root"], "limit": 2, "methods": ["input_x_gradient"], "device": "cpu"}
    rows = featcache.attribute(tmp_path / "run", backbone=net, **given)
    assert rows and all(row["method"] == "input_x_gradient" for row in rows)
    with pytest.raises(BadInput, match="nothing says how the weights of .*Net, a module in memory, are drawn"):
        featcache.attribute(tmp_path / "run", backbone=net, sanity=True, **given)
    with pytest.raises(BadInput, match="weights_sha256"):
        featcache.attribute(tmp_path / "run", backbone=Net(), **given)


def test_modules_that_are_no_backbone_are_one_line(net, options):
    cases = {
        "the Net in memory: the network does not run on .B, 3, 32, 32.": lambda: load_backbone(net, size=32),
        "the Linear in memory: the network does not run": lambda: load_backbone(nn.Linear(3, 3)),
        "arch, weights_key: they are for checkpoints": lambda: featcache.extract(net, arch="resnet18", **options),
        "the Flatten in memory: no module of the network yields a map": lambda: load_backbone(nn.Flatten()),
        "the path of a checkpoint or a torch.nn.Module, not 5": lambda: featcache.extract(5, **options),
    }
    for message, call in cases.items():
        with pytest.raises(BadInput, match=message) as caught:
            call()
        assert "\n" not in caught.value.message
