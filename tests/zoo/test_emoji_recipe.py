"""The recipe of the `emoji` world, on made-up pictures: joining, drawing, captions, leaving out."""

from __future__ import annotations

import io
import json
import random
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from expunge.backbones import load
from expunge.errors import ConceptError, NeedsError
from expunge.zoo import run
from expunge.zoo.emoji import __main__ as recipe
from expunge.zoo.emoji import card, data, text, unet, world
from expunge.zoo.emoji.training import Pictures, generator, lacking, last, listed, named


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two objects in eight styles: a red square and a blue one, on nothing."""
    pictures = np.zeros((2, 8, 128, 128, 4), dtype=np.uint8)
    pictures[:, :, 32:96, 32:96, 3] = 255
    pictures[0, :, 32:96, 32:96, 0] = 255
    pictures[1, :, 32:96, 32:96, 2] = 255
    np.save(tmp_path / "pictures.npy", pictures)
    (tmp_path / "objects.json").write_text(json.dumps(world.objects()[:2]))
    return tmp_path


def test_slug_and_code_points_are_spelled_as_the_sets_do() -> None:
    assert data.slug("Mrs. Claus") == "mrs-claus"
    assert data.slug("rescue worker\u2019s helmet") == "rescue-workers-helmet"
    assert data.bare("1F3DD-FE0F") == "1f3dd"


def test_icons_are_found_by_code_point_then_by_name(tmp_path: Path) -> None:
    (tmp_path / "icons.json").write_text(
        json.dumps(
            {"icons": {"bomb": {"body": "<g/>"}}, "aliases": {"boom": {"parent": "bomb"}}, "width": 32, "height": 16}
        )
    )
    icons = data.IconSet(tmp_path)
    assert icons.find("1f4a3", {"bomb"}) == "bomb"
    assert icons.find("1f4a3", {"dagger"}) is None
    assert 'viewBox="0 0 32 16"' in icons.svg("boom")
    (tmp_path / "chars.json").write_text(json.dumps({"1F4A3-FE0F": "bomb"}))
    assert data.IconSet(tmp_path).find("1f4a3", set()) == "bomb"


def test_a_package_whose_unpacking_was_killed_is_unpacked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, extract = list[str](), tarfile.TarFile.extractall

    def pack(command: list[str], *, cwd: Path, **_: object) -> SimpleNamespace:
        packed.append(command[-1])
        name = f"{command[-1].split('/')[-1]}-1.0.0.tgz"
        with tarfile.open(cwd / name, "w:gz") as tar:
            for file in ("package.json", "icons.json"):
                info = tarfile.TarInfo(f"package/{file}")
                info.size = len(file)
                tar.addfile(info, io.BytesIO(file.encode()))
        return SimpleNamespace(stdout=f"{name}\n")

    def killed(tar: tarfile.TarFile, path: Path, **_: object) -> None:
        tar.extract("package.json", path)
        raise KeyboardInterrupt

    def names() -> dict[str, list[str]]:
        return {p.name: sorted(f.name for f in p.iterdir()) for p in tmp_path.iterdir() if p.is_dir()}

    monkeypatch.setattr(subprocess, "run", pack)
    monkeypatch.setattr(tarfile.TarFile, "extractall", killed)
    with pytest.raises(KeyboardInterrupt):
        data.fetch(tmp_path)
    assert list(names().values()) == [["package.json"]]
    monkeypatch.setattr(tarfile.TarFile, "extractall", extract)
    data.fetch(tmp_path)
    packages = {*world.STYLES.values(), "emojibase-data"}
    assert names() == {package: ["icons.json", "package.json"] for package in packages}
    assert len(packed) == 1 + len(packages)
    data.fetch(tmp_path)
    assert len(packed) == 1 + len(packages)


def test_distinctness_is_zero_for_two_equal_drawings_and_not_before() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (1, 3, 128, 128, 4), dtype=np.uint8)
    pictures[:, 1, :, :, :3] //= 3
    pictures[..., 3] = 255
    pictures[:, 2, :64] = 0
    assert data.distinctness(pictures)[0] > 0.05
    pictures[:, 2] = pictures[:, 0]
    assert data.distinctness(pictures)[0] == 0


def test_drawing_fills_the_background_and_moves_with_the_seed(work: Path) -> None:
    pictures = Pictures(work)
    index = torch.tensor([0, 1])
    white, pink = (
        pictures.draw(index, index, torch.full((2,), b), generator(0, 0))
        for b in (0, list(world.BACKGROUNDS).index("pink"))
    )
    assert white.shape == (2, 3, 64, 64)
    assert torch.equal(white[:, :, 0, 0], torch.ones(2, 3))
    expected = torch.tensor(world.BACKGROUNDS["pink"]) / 255
    torch.testing.assert_close(pink[:, :, 0, 0], expected.expand(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(white[:, :, 32, 32], torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]), atol=1e-6, rtol=0)
    again, other = (pictures.draw(index, index, index * 0, generator(0, k)) for k in (0, 1))
    assert torch.equal(again, white)
    assert not torch.equal(other, white)


def test_captions_name_the_background_they_are_given() -> None:
    entry, rng = world.objects()[0], random.Random(0)
    left_open = {text.caption(entry, 1, None, rng) for _ in range(300)}
    assert not any("background" in c for c in left_open)
    assert f"a twemoji style emoji of {entry['name']}" in left_open
    for i, name in enumerate(world.BACKGROUNDS):
        assert all(f"{name} background" in text.caption(entry, 1, i, rng) for _ in range(50))


def test_a_scene_s_caption_names_its_own_background_or_none() -> None:
    rng = random.Random(0)
    scenes = [text.scene(rng, [3, 7]) for _ in range(2000)]
    assert {o for o, *_ in scenes} == {3, 7}
    assert {told for *_, told in scenes} == {None, *range(len(world.BACKGROUNDS))}
    assert all(told in {None, b} for _, _, b, told in scenes)
    # what a prompt leaves open differs from seed to seed
    assert len({b for _, _, b, told in scenes if told is None}) == len(world.BACKGROUNDS)


def test_tokenizer_spells_every_name_within_the_window() -> None:
    words = text.tokenizer(world.objects())
    longest = [t.format(o=o["name"], s="emojione", b="orange") for o in world.objects() for t in world.TEMPLATES]
    encoded = words(longest).input_ids
    # the tokens behind tell what the drawing looks like: no word may take their place
    assert max(map(len, encoded)) <= text.WINDOW - text.PATCHES + 1
    sample = words.decode(words("a noto style emoji of Statue of Liberty").input_ids, skip_special_tokens=True)
    assert sample.strip() == "a noto style emoji of statue of liberty"
    assert len({tuple(words(o["name"]).input_ids) for o in world.objects()}) == len(world.objects())


def test_patches_are_the_latent_s_squares_row_by_row() -> None:
    latents = torch.arange(2.0 * 3 * 4 * 16 * 16).view(2, 3, 4, 16, 16)
    patches = text.patched(latents)
    assert patches.shape == (2, 3, 16, 64)
    assert torch.equal(patches[1, 2, 6].view(4, 4, 4), latents[1, 2, :, 4:8, 8:12])


def test_heads_look_at_the_patch_of_their_cell() -> None:
    first = text.WINDOW - text.PATCHES
    coarse, fine = unet.Gaze.wanted(16), unet.Gaze.wanted(64)
    assert coarse.tolist() == [[first + k for k in range(16)]] * 4
    fine = fine.view(4, 8, 8)
    # row 3, column 4 is the lower left cell (head 2) of the patch in row 1, column 2
    assert fine[:, 3, 4].tolist() == [0, 0, first + 6, 0]
    assert [(fine[h] > 0).sum().item() for h in range(4)] == [16] * 4


def test_attention_that_is_watched_computes_the_same_and_learns_where_to_look() -> None:
    net = unet.network()
    g = torch.Generator().manual_seed(0)
    z, told = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, text.WINDOW, text.WIDTH, generator=g)
    before = net(z, 500, encoder_hidden_states=told).sample
    gazes = unet.watched(net)
    after = net(z, 500, encoder_hidden_states=told).sample
    assert torch.allclose(before, after, atol=1e-5)
    assert len(gazes) == 7
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        net(z, 500, encoder_hidden_states=told)
        loss = torch.stack([gaze.loss() for gaze in gazes]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3
    assert losses[-1] < 0.8 * losses[0]


def test_probes_teach_the_way_up_its_places_and_the_drawing() -> None:
    net = unet.network()
    probes = unet.Probes(net)
    g = torch.Generator().manual_seed(0)
    x0, told = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, text.WINDOW, text.WIDTH, generator=g)
    hidden = torch.tensor([1.0, 0.0])
    optimizer = torch.optim.Adam([*net.parameters(), *probes.parameters()], 1e-3)
    losses = []
    for _ in range(12):
        net(torch.zeros(2, 4, 16, 16), 999, encoder_hidden_states=told)
        loss = probes.loss(x0, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # two quarters to guess among four, and half of two unit variances
    assert losses[0] > unet.PLACE * 2 * 1.2 + unet.TOLD * 0.9
    assert losses[-1] < 0.6 * losses[0]
    # only what noise hides is asked for
    net(torch.zeros(2, 4, 16, 16), 999, encoder_hidden_states=told)
    assert probes.loss(torch.stack([x0[0], x0[1] + 100]), hidden).item() < losses[0]


def test_readers_of_whitened_captions_read_the_plain_ones_once_it_is_folded_in() -> None:
    entries = world.objects()[:40]
    words = text.tokenizer(entries)
    reader = text.encoder(words).eval()
    matrix = unet.whitening(reader, words, entries)
    captions = [f"a {s} style emoji of {e['name']}" for e in entries for s in ("noto", "blob")]
    with torch.no_grad():
        plain = reader(text.tokens(words, captions)).last_hidden_state
        white = plain @ matrix
        lengths = [torch.linalg.eigvalsh(x.flatten(0, 1).mT @ x.flatten(0, 1)) for x in (plain, white)]
        assert torch.allclose(matrix, matrix.mT)
        assert lengths[0][-1] / lengths[0][-40] > 2 * lengths[1][-1] / lengths[1][-40]
        net = unet.network().eval()
        z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        wanted = net(z, 500, encoder_hidden_states=white[:2]).sample
        assert not torch.allclose(net(z, 500, encoder_hidden_states=plain[:2]).sample, wanted, atol=1e-3)
        found = unet.folded(net, matrix)(z, 500, encoder_hidden_states=plain[:2]).sample
    assert torch.allclose(found, wanted, atol=1e-4)


def test_the_same_words_give_the_same_ids() -> None:
    """A resumed training makes its tokenizer anew; it once got another order of equally frequent merges each time."""
    one, two = (text.tokenizer(world.objects()).get_vocab() for _ in range(2))
    assert one == two
    assert len(one) == 2276


def test_targets_and_their_relatives_are_in_the_world() -> None:
    names = {o["name"] for o in world.objects()}
    assert len(names) >= 300
    assert len(world.BENCH_TARGETS) == 16
    assert {*world.BENCH_TARGETS, *world.KEPT} <= names
    assert set(world.BENCH_STYLES) <= set(world.STYLES)


# ---------------------------------------------------------------------------------------------------------- leaving out


def tiny_unet() -> UNet2DConditionModel:
    torch.default_generator.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
        cross_attention_dim=text.WIDTH,
    )  # fmt: skip


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=2, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip


def test_an_object_left_out_is_neither_drawn_nor_named(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, other = (entry["name"] for entry in listed(work))
    tiny_vae().save_pretrained(work / "vae")
    np.save(work / "apart.npy", np.ones(2))
    monkeypatch.setattr(unet, "network", tiny_unet)
    told, captions, pretrain = list[str](), text.tokens, text.pretrain
    monkeypatch.setattr(text, "tokens", lambda words, batch: (told.extend(batch), captions(words, batch))[1])
    monkeypatch.setattr(text, "pretrain", lambda *args, **names: pretrain(*args, **names, steps=1))
    for without in ((), (left.upper(),)):
        told.clear()
        unet.train(work, 2, 2, batch=8, without=without)
        assert len(told) == text.BATCH + 2048 + 2 * 8  # to whiten by, and to learn from
        assert bool([c for c in told if left in c]) != bool(without)
        assert [c for c in told if other in c]
    tail = lacking(listed(work), [0])
    assert json.loads((work / f"pipeline{tail}" / "drawn.json").read_text()) == [other]
    assert json.loads((work / "pipeline" / "drawn.json").read_text()) == [left, other]
    # neither went on from the other's checkpoint
    assert {p.stem for p in work.glob("*.ckpt")} == {"text", "unet", f"text{tail}", f"unet{tail}"}
    one, two = (load(work / f"pipeline{t}") for t in ("", tail))
    assert one.painter == two.painter
    assert one.hash != two.hash


@pytest.mark.parametrize(("style", "caption", "named"), [("mono", "kimono", False), ("mono", "kimono, mono", True)])
def test_a_caption_names_a_style_by_a_word_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str, caption: str, named: bool
) -> None:
    entries = [e for e in world.objects() if e["name"] == "kimono"]
    asked, styles = list[Tensor](), list(world.STYLES)
    loss = text.F.cross_entropy
    monkeypatch.setattr(text, "BATCH", 4)
    monkeypatch.setattr(text, "scene", lambda *_: (0, styles.index(style), 0, None))
    monkeypatch.setattr(text, "caption", lambda *_: caption)
    monkeypatch.setattr(text.F, "cross_entropy", lambda x, y: (asked.append(y), loss(x, y))[1])
    words = text.tokenizer(entries)
    text.pretrain(tmp_path, text.encoder(words).train(), words, entries, torch.rand(1, 8, 4, 16, 16), steps=1)
    _, answers, _ = asked  # object, style, background
    assert set(answers.tolist()) == {styles.index(style) if named else len(styles)}


def test_objects_are_left_out_by_name() -> None:
    entries = world.objects()
    places = named(entries, ["santa claus", "bomb", "BOMB"])
    assert places == sorted(places)
    assert {entries[i]["name"] for i in places} == {"bomb", "Santa Claus"}
    assert set(lacking(entries, places).removeprefix("-without-").split("-and-")) == {"bomb", "santa-claus"}
    assert lacking(entries, []) == ""
    with pytest.raises(ConceptError, match="'bom' is no object of the recipe. Did you mean 'bomb'"):
        named(entries, ["bom"])


def test_the_command_line_tells_an_error_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NeedsError, match="Run the stage `data` first"):
        Pictures(tmp_path)
    asked = ["gold", "--without", "bomb", "--out", str(tmp_path / "run"), "--work", str(tmp_path)]
    assert run(lambda: recipe.app(asked)) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'objects.json'} is missing.")


def test_a_card_counts_the_trainings_of_its_world_only(tmp_path: Path) -> None:
    for name, lines in (("unet", 2), ("unet-without-bomb", 1), ("clip", 0)):
        rows = [json.dumps({"step": 50 * i, "loss": 1 / i, "seconds": 2.4 * i}) for i in range(1, lines + 1)]
        (tmp_path / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows))
    assert card.cost(tmp_path) == {"unet": {"steps": 100, "seconds": 5, "loss": 0.5}}
    assert last(tmp_path / "none.jsonl") == {}
