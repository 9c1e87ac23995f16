import torch

from expunge.metrics.clip import clip_cosines


def test_cosine_of_pairs():
    x = torch.tensor([[1.0, 0], [0, 2], [1, 0]])
    y = torch.tensor([[3.0, 0], [1, 0], [-1, 0]])
    assert clip_cosines((x, y), 3).tolist() == [1, 0, -1]


def test_without_a_clip_model_every_picture_is_an_error():
    assert clip_cosines(None, 3).isnan().all()
