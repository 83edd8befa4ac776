from pathlib import Path

import pytest
import torch
from PIL import Image

from spectralnorm.cli import main
from spectralnorm.gan import make_config
from spectralnorm.gan.networks import build_generator
from spectralnorm.gan.sampling import TrainedGenerator, load, save_generator


@pytest.fixture
def file(tmp_path: Path) -> Path:
    names, counts = ("cat", "dog"), (5, 5)
    config = make_config(
        "sngan-resnet-cifar10",
        steps=1,
        generator_width=2,
        latent_dim=8,
        conditional=True,
        class_names=names,
        class_counts=counts,
    )
    network = build_generator(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)  # fresh class weights are alike
    save_generator(tmp_path / "generator.safetensors", TrainedGenerator(network, config))
    return tmp_path / "generator.safetensors"


def test_seeds_name_their_files(file: Path, tmp_path: Path):
    words = ["sample", str(file), "--seeds", "3,0,8-10", "--format", "png", "--out", str(tmp_path / "images")]
    assert main(words) == 0
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        f"{seed:02d}.png" for seed in (0, 3, 8, 9, 10)
    ]
    images = load(file).sample(seeds=[8])
    shown = torch.frombuffer(bytearray(Image.open(tmp_path / "images" / "08.png").tobytes()), dtype=torch.uint8)
    difference = shown.int() - images.permute(0, 2, 3, 1).flatten().int()
    assert difference.abs().max() <= 1


def test_class_and_truncation_reach_the_generator(file: Path, tmp_path: Path):
    for name, words in (("a", ["--class", "dog"]), ("b", ["--class", "1"]), ("c", ["--class", "cat"])):
        assert main(["sample", str(file), "--num", "4", *words, "--out", str(tmp_path / f"{name}.png")]) == 0
    words = ["--class", "dog", "--truncation", "0.2"]
    assert main(["sample", str(file), "--num", "4", *words, "--out", str(tmp_path / "d.png")]) == 0
    a, b, c, d = ((tmp_path / f"{name}.png").read_bytes() for name in "abcd")
    assert a == b
    assert c != a != d


def test_a_video_shows_walks_side_by_side(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    video = tmp_path / "walk.webp"
    assert main(["sample", str(file), "--video", str(video), "--num", "2", "--frames", "5", "--fps", "10"]) == 0
    picture = Image.open(video)
    assert picture.size == (64, 32)
    assert picture.n_frames == 5  # pyright: ignore[reportAttributeAccessIssue]
    assert str(video) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--class bird", "Unknown class 'bird'; choose a name or a number of 0 cat, 1 dog"),
        ("--seeds 1,x", "whole numbers and ranges such as 0,1,5-9"),
        ("--seeds 9-5", "run backwards"),
        ("--seeds 0-99999999999", "at most 100,000"),
        ("--seeds 1 --num 3", "leave out --num"),
        ("--truncation 7", "truncation must be"),
        ("--video walk.avi", "must end in .gif"),
        ("--video walk.gif --frames 1", "frames must be at least 2"),
        ("--video walk.gif --interpolate", "leave out --interpolate"),
    ],
)
def test_a_slip_in_sample_is_one_sentence(words: str, says: str, file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sample", str(file), *words.split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
