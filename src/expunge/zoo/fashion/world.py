"""What the recipe can be made of: Fashion-MNIST, which is the shipped world, or CIFAR-10. Pure data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
# the shipped model's one-step generator: the name it is loaded by, and its run
ONE_STEP, GENERATOR = "fashion-one-step", WEIGHTS / "one-step"


@dataclass(frozen=True)
class Source:
    """A set of labelled pictures.

    Attributes:
        world: name of the world that a model of it draws.
        network: name of its feature network, which is a part of the distances' names.
        title: its name in print.
        classes: names of the classes, by label.
        channels: 1 for gray, 3 for colour.
        folder: where the pictures lie unless told otherwise.
        files: file name -> SHA-256 of its unpacked content; "" where only its form is checked.
        obtain: how to come by the files.
        credit: whose the pictures are, and what they show.
    """

    world: str
    network: str
    title: str
    classes: tuple[str, ...]
    channels: int
    folder: Path
    files: dict[str, str]
    obtain: str
    credit: str


FASHION = Source(
    world="fashion",
    network="fashion64",
    title="Fashion-MNIST",
    classes=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    channels=1,
    folder=Path("/usr/share/datasets/fashion-mnist"),
    files={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    obtain="On Debian: apt-get install dataset-fashion-mnist. Elsewhere: --source FOLDER with the four IDX files, "
    "packed (.gz) or not.",
    credit="by Zalando SE under the MIT licence (arXiv:1708.07747); they show clothes, no people",
)  # fmt: skip

CIFAR = Source(
    world="cifar10",
    network="cifar64",
    title="CIFAR-10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    channels=3,
    folder=Path("cifar-10-batches-bin"),
    files=dict.fromkeys((*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"), ""),
    obtain="--source FOLDER with the six files of its binary version (cifar-10-batches-bin).",
    credit="from A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
)

SOURCES = {s.world: s for s in (FASHION, CIFAR)}
