"""Run the tests of other libraries for their contrastive losses with the losses of twoview in their place.

    git clone https://github.com/lightly-ai/lightly LIGHTLY
    git clone https://github.com/KevinMusgrave/pytorch-metric-learning PML
    pip install lightly pytest pytest-mock            # for what the libraries need
    python benchmarks/tests_of_others.py --lightly LIGHTLY --pml PML

The constructors and memory banks stay those of the libraries; the values come from twoview. Cases that twoview does not
have stay with the library: other distances than the cosine, and other reductions than the mean. Left out are a test of
lightly with a negative temperature, which twoview refuses, and float16 in pytorch-metric-learning: on a CPU, one of its
losses with another distance misses its own test. The generators of the tests are seeded here: one test of lightly
compares fp32 losses to 1e-6, and about one case in a thousand differs by a rounding step.
"""

import argparse
import os
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.losses import info_nce, nt_xent, sup_con

LIGHTLY = ["tests/loss/test_ntx_ent_loss.py", "tests/loss/test_dcl_loss.py"]
PML_KNOBS = {"TEST_DEVICE": "cpu", "TEST_DTYPES": "float32,float64"}
PML = ["tests/losses/test_ntxent_loss.py", "tests/losses/test_self_supervised_loss.py"]


def replace_lightly() -> None:
    """Replace NTXentLoss, DCLLoss and DCLWLoss of lightly."""
    from lightly import loss
    from lightly.loss import dcl_loss

    class NTXentLoss(loss.NTXentLoss):  # type: ignore[misc]
        def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
            _, negatives = self.memory_bank.forward(F.normalize(out1, dim=1), update=out0.requires_grad)
            if negatives is None:
                return nt_xent(out0, out1, self.temperature)
            return info_nce(out0, out1, negatives.T, self.temperature)

    class DCLLoss(dcl_loss.DCLLoss):  # type: ignore[misc]
        def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
            return nt_xent(out0, out1, self.temperature, variant="dclw" if self.weight_fn else "dcl")

    class DCLWLoss(DCLLoss):
        def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
            super().__init__(temperature=temperature, weight_fn=len, gather_distributed=gather_distributed)
            self.sigma = sigma

        def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
            return nt_xent(out0, out1, self.temperature, variant="dclw", sigma=self.sigma)

    loss.NTXentLoss, dcl_loss.DCLLoss, dcl_loss.DCLWLoss = NTXentLoss, DCLLoss, DCLWLoss


def two_views(labels: Tensor) -> bool:
    """Whether the second half of the embeddings are second views of the first half."""
    first, second = labels[: len(labels) // 2], labels[len(labels) // 2 :]
    return len(labels) > 2 and torch.equal(first, second) and len(first.unique()) == len(first)


def pairs(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions of the anchors and of the positives of all pairs with equal labels."""
    equal = labels[:, None] == (labels if ref_labels is None else ref_labels)
    return torch.where(equal.fill_diagonal_(False) if ref_labels is None else equal)


def replace_pml() -> None:
    """Replace NTXentLoss and SupConLoss of pytorch-metric-learning."""
    from pytorch_metric_learning import distances, losses, reducers

    def is_ours(loss: Any) -> bool:
        plain = isinstance(loss.reducer, reducers.MeanReducer | reducers.AvgNonZeroReducer)
        return plain and isinstance(loss.distance, distances.CosineSimilarity)

    class NTXentLoss(losses.NTXentLoss):  # type: ignore[misc]
        def forward(self, embeddings: Tensor, labels: Tensor, *args: Any, **refs: Any) -> Tensor:
            if not is_ours(self):
                return super().forward(embeddings, labels, *args, **refs)  # type: ignore[no-any-return]
            ref, ref_labels = refs.get("ref_emb"), refs.get("ref_labels")
            if ref is None and two_views(labels):
                return nt_xent(*embeddings.chunk(2), self.temperature).to(embeddings.dtype)
            anchor, positive = pairs(labels, ref_labels)
            ref, ref_labels = (embeddings, labels) if ref is None else (ref, ref_labels)
            if not len(anchor):
                return 0 * embeddings.sum()
            same = (labels[anchor], ref_labels)
            loss = info_nce(embeddings[anchor], ref[positive], ref, self.temperature, same=same)
            return loss.to(embeddings.dtype)

    class SupConLoss(losses.SupConLoss):  # type: ignore[misc]
        def forward(self, embeddings: Tensor, labels: Tensor, *args: Any, **refs: Any) -> Tensor:
            if not is_ours(self):
                return super().forward(embeddings, labels, *args, **refs)  # type: ignore[no-any-return]
            ref, ref_labels = refs.get("ref_emb"), refs.get("ref_labels")
            if ref is None and two_views(labels):
                return sup_con(*embeddings.chunk(2), labels.chunk(2)[0], self.temperature).to(embeddings.dtype)
            anchor, positive = pairs(labels, ref_labels)
            own = torch.arange(len(embeddings)) if ref is None else torch.full((len(ref),), -1)
            ref = embeddings if ref is None else ref
            rows = []
            # By definition, the loss is 0 if all labels are equal.
            anchors = anchor.unique() if refs.get("ref_emb") is not None or len(labels.unique()) > 1 else []
            for i in anchors:  # the negatives of "dcl" are all candidates but the anchor itself
                of, count = positive[anchor == i], int((anchor == i).sum())
                q, same = embeddings[i].expand(count, -1), (i.expand(count), own)
                rows.append(info_nce(q, ref[of], ref, self.temperature, same=same, variant="dcl"))
            return torch.stack(rows).mean().to(embeddings.dtype) if rows else 0 * embeddings.sum()

    losses.NTXentLoss, losses.SupConLoss = NTXentLoss, SupConLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightly", help="clone of lightly")
    parser.add_argument("--pml", help="clone of pytorch-metric-learning")
    parser.add_argument("--inside", choices=["lightly", "pml"], help=argparse.SUPPRESS)  # in the process of the tests
    given, arguments = parser.parse_known_args()
    if given.inside:
        import numpy as np
        import pytest

        np.random.seed(0)  # noqa: NPY002 (the generator of the tests)
        torch.manual_seed(0)
        sys.path.insert(0, "src" if given.inside == "pml" else ".")  # the library of the clone
        {"lightly": replace_lightly, "pml": replace_pml}[given.inside]()
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))
    left_out = ["--deselect", f"{LIGHTLY[0]}::TestNTXentLoss::test_forward_pass_neg_temp"]
    for name, where, files in (("lightly", given.lightly, [*LIGHTLY, *left_out]), ("pml", given.pml, PML)):
        if where is not None:
            print(f"{name}:", flush=True)
            command = [sys.executable, os.path.abspath(__file__), "--inside", name, *files]
            subprocess.run(command, cwd=where, check=True, env=os.environ | PML_KNOBS)


if __name__ == "__main__":
    main()
