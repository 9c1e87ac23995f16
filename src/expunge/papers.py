"""The publications that methods come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """The publication a method comes from."""

    key: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str

    def bibtex(self) -> str:
        """Return the entry for a bibliography."""
        fields = {"title": self.title, "author": self.authors, "year": self.year, "booktitle": self.venue}
        body = "".join(f"  {k} = {{{v}}},\n" for k, v in fields.items())
        return f"@inproceedings{{{self.key},\n{body}  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"


# what methods implement by a setting besides what their own paper says; `expunge cite` knows them by these names
ALSO: dict[str, Paper] = {
    # `ap` with adaptive=True
    "age": Paper(
        "bui2025fantastic",
        "Fantastic Targets for Concept Erasure in Diffusion Models and Where To Find Them",
        "Bui, Anh and Vu, Thuy-Trang and Vuong, Long and Le, Trung and Montague, Paul and Abraham, Tamas and "
        "Kim, Junae and Phung, Dinh",
        2025,
        "International Conference on Learning Representations",
        "2501.18950",
    ),
    # `neggrad` with alpha=0, by the name it has there
    "negative-gradient": Paper(
        "golatkar2020eternal",
        "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        "Golatkar, Aditya and Achille, Alessandro and Soatto, Stefano",
        2020,
        "Conference on Computer Vision and Pattern Recognition",
        "1911.04933",
    ),
    # methods with a setting `smallest`
    "sara": Paper(
        "hu2025sara",
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        "Hu, Teng and Zhang, Jiangning and Yi, Ran and Huang, Hongrui and Wang, Yabiao and Ma, Lizhuang",
        2025,
        "International Conference on Learning Representations",
        "2409.06633",
    ),
}


# UCE, and TUCE after it
UNIFIED = Paper(
    "gandikota2024unified",
    "Unified Concept Editing in Diffusion Models",
    "Gandikota, Rohit and Orgad, Hadas and Belinkov, Yonatan and Materzynska, Joanna and Bau, David",
    2024,
    "Winter Conference on Applications of Computer Vision",
    "2308.14761",
)
